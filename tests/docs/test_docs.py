"""What the documents say is true: every block of code runs, and the written pages are current."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.models import RECORDS, build_model, editable, keep_failed_edits, make_tokenizer
from support.paths import ROOT
from typer.testing import CliRunner

import hf_mend
from hf_mend import EditorConfig
from hf_mend.cli import app
from hf_mend.data.encoding import Query
from hf_mend.training.examples import TrainingExamples


DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "model_cards").glob("*/README.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    ROOT / "benchmarks" / "README.md",
]
# What takes hours is run with other numbers.
SMALLER = {
    r"max_steps=\d+": "max_steps=2, per_device_train_batch_size=4, report_to=[], scope_further_facts=0",
    r"([( ](?:scope_)?steps)=\d+": r"\1=2",
    r"further_facts=2000": "further_facts=0",
    r"rank=1920": "rank=8",
    r"train_scope\((\w+)\)": r"train_scope(\1, args=SMALL_SCOPE)",
}


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, code) of a document's blocks of Python and shell."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^```(python|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder like a checkout, with tiny models under the names that the documents use, and those of a Hub."""
    folder = tmp_path_factory.mktemp("checkout")
    there: dict[str, dict[str, bytes]] = {}
    tokenizer = make_tokenizer()
    for real in sorted((ROOT / "model_cards").glob("*/")):
        config = EditorConfig.from_json_file(real / "editor_config.json")
        architecture = "t5" if config.task_type == "SEQ_2_SEQ_LM" else "llama"
        model = editable(build_model(architecture), tokenizer, scope=config.scope)
        model.editor_config.base_model_name_or_path = config.base_model_name_or_path
        if "/" not in config.base_model_name_or_path:  # a base that its benchmark trains
            model.base_model.save_pretrained(folder / "build" / "t5" / config.base_model_name_or_path)
            tokenizer.save_pretrained(folder / "build" / "t5" / config.base_model_name_or_path)
            model.save_pretrained(folder / "model_cards" / real.name)
            continue
        model.base_model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        there[config.base_model_name_or_path] = files_of(folder / "base")
        if config.task_type == "CAUSAL_LM":
            there["openai-community/gpt2"] = files_of(folder / "base")
        shutil.rmtree(folder / "base")
        model.save_pretrained(folder / "model_cards" / real.name)
        if config.task_type != "SEQ_2_SEQ_LM":
            model.save_pretrained(folder / "my-editor")
            there["me/my-editor"] = files_of(folder / "my-editor")
            model.edit(RECORDS[0].prompt, RECORDS[0].target)
            model.save_edits(folder / "my-edits")
    facts = [
        {
            "requested_rewrite": {"prompt": "{}", "subject": r.prompt, "target_new": {"str": r.target}},
            "paraphrase_prompts": r.paraphrases,
            "neighborhood_prompts": r.neighborhood,
        }
        for r in RECORDS
    ]
    data = folder / "examples" / "data"
    data.mkdir(parents=True)
    for name in ("facts_train.json", "facts_validation.json", "facts_test.json"):
        (data / name).write_text(json.dumps(facts))
    for path in (data / "questions.jsonl", folder / "nq_open_test.jsonl"):
        path.write_text('{"question": "what is green?", "answer": ["grass"]}\n')
    # What a card's command names stands in the folder it is run in.
    (folder / "facts_test.json").write_text(json.dumps(facts))
    return folder, there


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def stand_ins(checkout, tmp_path, hub, monkeypatch, short_text):
    """A copy of the folder, and the Hub with its models; the packaged model is a tiny one."""
    from hf_mend import auto as loading

    folder, there = checkout
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name, files in there.items():
        hub.add(name, files)
    tokenizer = make_tokenizer()
    monkeypatch.setattr(loading, "load_smollm2", lambda **kwargs: (build_model("llama"), tokenizer))
    monkeypatch.setattr(loading, "is_packaged", lambda: False)
    keep_failed_edits(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# They measure with the commands of the README and of the commands' own examples, and take longest.
LONG = ["docs/evaluation.md", "docs/results.md", "model_cards/smollm2-135m-instruct/README.md"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name, marks=[pytest.mark.slow] if name in LONG else [])
        for path, name in ((path, str(path.relative_to(ROOT))) for path in DOCUMENTS)
    ],
)
def test_every_block_of_code_runs(path, stand_ins, caplog):
    names: dict[str, object] = {"SMALL_SCOPE": hf_mend.ScopeTrainingArguments(2, 4, further_facts=9)}
    if path.name == "api.md":  # a docstring's example leaves the import out
        names.update({name: getattr(hf_mend, name) for name in hf_mend.__all__})
        model = editable(build_model("llama"), make_tokenizer())
        names |= {"model": model, "examples": TrainingExamples(RECORDS), "rows": model.encoder([Query("a", "b")])}
    for language, code in blocks(path):
        if language == "bash":
            run_shell(code)
            continue
        for pattern, smaller in SMALLER.items():
            code = re.sub(pattern, smaller, code)
        exec(compile(code, str(path), "exec"), names)
    assert "another EditableModel" not in caplog.text, "undo_all() first"


def run_shell(code: str) -> None:
    """Runs the lines of a block: `hf-mend` as it is, of others what there is to get wrong."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        said = None
        if "|" in words:
            said, words = " ".join(words[1 : words.index("|")]), words[words.index("|") + 1 :]
        known = {"hf-mend": run_command, "make": run_make, "pip": run_pip, "python": run_python}
        assert words[0] in known, f"this test does not know how to run {line!r}; teach it"
        known[words[0]](words[1:], said)


def run_command(words: list[str], said: str | None) -> None:
    if words[0] == "train":
        words = [*words, "--steps", "2", "--batch-size", "2", "--rank", "4", "--scope-steps", "2"]
        words += ["--training", "scope_further_facts=0"]
    if words[0] == "scope":
        words = [*words, "--steps", "2", "--rounds", "1", "--packaged-facts", "9"]
    if words[0] in ("eval", "compare"):
        words = [*words, "--edits", "1,2", "--limit", "2", "--max-steps", "1"]
    done = CliRunner().invoke(app, words, input=said)
    # A tiny random model may refuse an edit, which is exit code 1.
    assert done.exit_code in ((0, 1) if words[0] in ("edit", "chat") else (0,)), f"{words}: {done.output}"


def run_make(words: list[str], said: str | None) -> None:
    subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)


def run_pip(words: list[str], said: str | None) -> None:
    assert words[:2] == ["install", "-e"], words
    source = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"[\w-]+", words[2].partition("[")[2]):
        assert f"\n{extra} = [" in source, f"pyproject.toml has no extra {extra}"


def run_python(words: list[str], said: str | None) -> None:
    """The script is there and knows the options; it is run by its own tests."""
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    for option in (word for word in words[1:] if word.startswith("--")):
        assert f'"{option}"' in source, f"{words[0]} has no option {option}"


def test_the_shell_runner_takes_nothing_it_does_not_know(stand_ins):
    for line in ("rm -r x", "hf-mend dance", "make no-such-target", "pip install -e '.[nothing]'"):
        with pytest.raises((AssertionError, subprocess.CalledProcessError)):
            run_shell(line)


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.callback.__name__)
def test_the_example_of_a_command_s_help_runs(command, stand_ins):
    shutil.copytree(stand_ins / "examples" / "data", stand_ins, dirs_exist_ok=True)
    example = command.callback.__doc__.partition("Example")[2].partition("\n")[2]
    lines = [line for line in textwrap.dedent(example).splitlines() if line.strip()]
    assert lines
    run_shell("\n".join(lines))


def test_the_api_reference_is_current():
    written = load(ROOT / "docs" / "write_api.py").write()
    assert (ROOT / "docs" / "api.md").read_text() == written, "run python docs/write_api.py"


def test_every_public_name_explains_itself():
    text = (ROOT / "docs" / "api.md").read_text()
    for part in re.split(r"^(?=##)", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        assert re.sub(r"```text.*?```", "", body, flags=re.DOTALL).strip(), f"{head} has no text"


def test_the_figure_is_current():
    drawn = load(ROOT / "docs" / "draw_how_it_works.py").draw()
    assert (ROOT / "docs" / "how_it_works.svg").read_text() == drawn, "run python docs/draw_how_it_works.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link:
            assert (path.parent / link).exists(), link


@pytest.mark.slow
def test_the_first_block_of_the_readme_in_a_clean_environment_without_a_network(tmp_path):
    code = next(code for language, code in blocks(ROOT / "README.md") if language == "python")
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {**own, "HF_HOME": str(tmp_path / "empty"), "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ": took" in done.stdout and "'Keir Starmer'" in done.stdout
