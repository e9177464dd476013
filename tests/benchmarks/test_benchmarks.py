"""The benchmark scripts from an empty folder, on a tiny model in place of the real one."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.facts import write_facts
from support.models import build_model, editable, make_tokenizer
from support.paths import ROOT
from support.scope import scoped
from support.training import QUESTIONS

from hf_mend import EditorTrainer, read_counterfact
from hf_mend.data.encoding import Query
from hf_mend.edits.store import EditStore


BENCHMARKS = ROOT / "benchmarks"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
LAYERS = ["--option", 'target_modules="paper"', "--option", "layers_to_transform=[1, 2]"]


@pytest.fixture
def script(monkeypatch, tmp_path, short_text):
    """Runs a script's `main` on a folder of facts in the layout that it reads."""
    asked = "".join(json.dumps({"question": question, "answer": [answer]}) + "\n" for question, answer in QUESTIONS)
    for name in ("train", "validation", "test"):
        write_facts(tmp_path / f"facts_{name}.json")
        (tmp_path / f"nq_open_{name}.jsonl").write_text(asked)
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name: str, *options: str, chat_template: str | None = None) -> None:
        module, tokenizer = importlib.import_module(name), make_tokenizer()
        tokenizer.chat_template = chat_template
        monkeypatch.setattr(module, "load_base", lambda: (build_model("llama"), tokenizer))
        monkeypatch.setattr(sys, "argv", [name, "--data", str(tmp_path), *options])
        module.main()

    yield run
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_ablations_begin_in_an_empty_folder_and_go_on(script, tmp_path):
    results = tmp_path / "new" / "ablations"
    for variants in ("x only", "x only,MEND"):
        script(
            "ablations", "--results", str(results), "--steps", "1", "--batch-size", "4", "--variants", variants,
            *LAYERS, "--option", "rank=8",
        )  # fmt: skip
        found = json.loads(results.with_suffix(".json").read_text())
        assert list(found["variants"]) == variants.split(",")
        head, rule, *rows = results.with_suffix(".md").read_text().splitlines()
        assert head.startswith("| variant | edit success | generality | neighbourhood | unrelated | mean of these |")
        assert sum("million" in row for row in rows) == len(found["variants"])
        assert {line.count("|") for line in (head, rule, *rows[: len(found["variants"])])} == {head.count("|")}
        assert "torch" in found["machine"]


@pytest.fixture
def denormals():
    """What a script sets for its process goes with its test."""
    yield
    torch.set_flush_denormal(False)


def test_the_scoped_editor_s_training_goes_on_where_it_was_interrupted(script, tmp_path, monkeypatch, denormals):
    """The weights are those of a run without a break: steps, draws, optimizer and rate went on."""
    editable(build_model("llama"), make_tokenizer(), scope=True).save_pretrained(tmp_path / "start")
    (tmp_path / "questions.jsonl").write_text((tmp_path / "nq_open_train.jsonl").read_text())
    options = (
        "--examples",
        str(tmp_path),
        "--start-from",
        str(tmp_path / "start"),
        "--steps",
        "6",
        "--batch-size",
        "4",
    )
    options = (
        *options,
        "--further-facts",
        "0",
        "--scope-steps",
        "1",
        "--scope-facts",
        "8",
        "--hold-out",
        "",
        "--no-bf16",
    )
    module = importlib.import_module("train_scoped_editor")
    monkeypatch.setattr(module, "SAVE_STEPS", 2)
    real, calls, lost = EditorTrainer.compute_loss, [], 4

    def compute_loss(*given, **more):
        calls.append(given)
        if len(calls) == lost:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(EditorTrainer, "compute_loss", compute_loss)

    def train(name: str, *more: str) -> None:
        folders = ("--checkpoints", str(tmp_path / name), "--output", str(tmp_path / name))
        script("train_scoped_editor", *options, *folders, *more, chat_template=CHAT)

    with pytest.raises(KeyboardInterrupt):
        train("kept")
    for name in ("kept", "unbroken"):
        train(name)
    assert len(calls) == lost + 4 + 6, "the two steps that were kept were not made again"
    whole, again = (load_file(tmp_path / name / "editor.safetensors") for name in ("unbroken", "kept"))
    start = load_file(tmp_path / "start" / "editor.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert any(not torch.equal(value.float(), start[name].float()) for name, value in whole.items())
    scope = load_file(tmp_path / "kept" / "scope.safetensors")
    # Gone on from, and without steps for it, an editor keeps its scope.
    train("further", "--start-from", str(tmp_path / "kept"), "--scope-steps", "0", "--steps", "1")
    further = load_file(tmp_path / "further" / "scope.safetensors")
    assert all(torch.equal(further[name], value) for name, value in scope.items())


def test_quality_trains_and_measures(script, tmp_path):
    script(
        "quality", "--output", str(tmp_path / "editor"), "--results", str(tmp_path / "quality"), "--steps", "1",
        "--batch-size", "4", "--limit", "4", "--together", "2", "--target-modules", "down_proj", "--layers", "1,2",
        "--option", "rank=8", "--checkpoints", str(tmp_path / "checkpoints"), "--resume",
    )  # fmt: skip
    found = json.loads((tmp_path / "quality.json").read_text())["metrics"]
    assert {name: values["edits"] for name, values in found.items()} == {"all": 4, "all, 2 edits applied together": 4}
    assert (tmp_path / "editor" / "editor.safetensors").is_file()
    script(
        "quality", "--output", str(tmp_path / "editor"), "--results", str(tmp_path / "again"), "--evaluate",
        "--together", "2",
    )  # fmt: skip
    card = (tmp_path / "editor" / "README.md").read_text()
    assert "quality.py --data DIR --evaluate --together 2 " in card and "2 edits applied together" in card


def test_many_edits_measures_each_state_once(script, tmp_path, capsys):
    options = ("--results", str(tmp_path / "many"), "--methods", "memit=memit", *LAYERS, "--option", "num_steps=2")
    options = (*options, "--measured", "2")
    script("many_edits", *options, "--counts", "1,3", "--sequential", "", "--observe", "2")
    script("many_edits", *options, "--counts", "1,3", "--sequential", "4", "--call", "2", "--observe", "2")
    states = json.loads((tmp_path / "many.json").read_text())["states"]
    assert list(states) == ["memit/1/None", "memit/3/None", "memit/4/2"]
    assert capsys.readouterr().out.count("memit/1/None") == 1
    assert (tmp_path / "many.png").is_file()


def test_kernels_and_waits_are_counted_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("counts")
    monkeypatch.setattr(module, "load_base", lambda: (build_model("llama"), make_tokenizer()))
    monkeypatch.setattr(module, "SEVERAL", ["the capital of peru is", "the river of japan is"])
    monkeypatch.setattr(sys, "argv", ["counts", "--results", str(tmp_path / "counts")])
    monkeypatch.setattr(module, "TARGET", "rome")
    monkeypatch.setattr(module, "PROMPT", "the capital of france is")
    before = module.projection._LARGE, module.by_length._FEW_TOKENS, module.prefix.pays
    module.main()
    assert before == (module.projection._LARGE, module.by_length._FEW_TOKENS, module.prefix.pays)
    found = json.loads((tmp_path / "counts.json").read_text())["counts"]
    for calls in found.values():
        forward, edit, checked, *_ = calls.values()
        assert forward["of a forward pass's"] == 1 and forward["kernels"] < edit["kernels"] < checked["kernels"]
        # A scoped edit that is unsure in four bits is looked at as it was found too.
        assert 1 <= checked["waits"] - edit["waits"] <= 2
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_figures_of_a_gpu_are_written_one_by_one(monkeypatch, tmp_path):
    """With random weights and texts: nothing but the script is needed. What the minutes do not hold is named."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu")
    written = []
    write = module.Report.write

    def note(self):
        write(self)
        written.append(json.loads((tmp_path / "gpu.json").read_text()))

    monkeypatch.setattr(module.Report, "write", note)

    def run(*options):
        written.clear()
        output = str(tmp_path / "gpu.json")
        monkeypatch.setattr(sys, "argv", ["gpu", "--shape", "tiny", "--repeat", "1", "--output", output, *options])
        module.main()
        return written[-1]

    found = run("--minutes", "6", "--most", "16", "--compile", "eager")
    figures = found["figures"]["tiny, float32"]
    assert found["left_out"] == {} and len(written) > 6
    assert written[0]["figures"]["tiny, float32"].keys() == {"f", "forward pass, s"}, "the most wanted first"
    for name in ("edit / forward pass", "edit with the check / forward pass", "16 edits in a call, edits/s"):
        assert figures[name] > 0
    for name in ("training, ours without cache, edits/s", "training, the paper's procedure, edits/s"):
        assert figures[name] > 0
    for name in ("first edit, s", "edit, s", "edit with the check / forward pass"):
        assert figures[f"compiled by eager: {name}"] > 0
    assert figures["generation of 50 tokens with 1 edits, in scope, s"] > 0
    late = run("--minutes", "0")
    assert late["figures"] == {} and "minutes" in str(late["left_out"])
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_kept_edits_act_in_scope_and_no_other_does_outside(monkeypatch):
    """What generation with thousands of edits is measured on: one is asked for, or none."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu")
    model = module.loaded("tiny", "float32", scope=True)
    record, other = module.random_records(2)
    module.keep_edits(model, record, 20)
    assert len(model.edits) == 20
    acting = [one.id for one in model.which_edits(record.prompt) if one.acts]
    assert acting == [model.edits[0].id]
    assert not [one for one in model.which_edits(other.prompt) if one.acts]
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_shapes_weigh_what_their_parameters_do(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu")
    base = module.random_base("tiny", "float32")
    held = sum(parameter.numel() * 4 for parameter in base.parameters())
    assert module.bytes_needed("tiny", "float32") == pytest.approx(held, rel=0.02)
    assert not any(tensor.is_meta for tensor in [*base.parameters(), *base.buffers()])
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_edits_with_a_scope_are_kept_and_measured_in_the_wild(script, tmp_path, monkeypatch):
    scoped(build_model("llama"), make_tokenizer()).save_pretrained(tmp_path / "editor")
    options = ("--results", str(tmp_path / "many"), "--methods", "", "--scoped", str(tmp_path / "editor"))
    options = (*options, "--measured", "2", "--call", "2", "--scoped-counts")
    script("many_edits", *options, "2")
    assert len(EditStore(tmp_path / "many.store").edits) == 2
    script("many_edits", *options, "2,4")
    states = json.loads((tmp_path / "many.json").read_text())["in the wild"]
    assert list(states) == ["2", "4"] and "perplexity" in states["4"]
    assert len(EditStore(tmp_path / "many.store").edits) == 4
    assert "| behind text |" in (tmp_path / "many.md").read_text()


def test_in_the_wild_measures_alone_beside_others_and_without_scopes(script, tmp_path):
    scoped(build_model("llama"), make_tokenizer()).save_pretrained(tmp_path / "editor")
    options = ("--editor", str(tmp_path / "editor"), "--limit", "2", "--store", str(tmp_path / "store"))
    for name, more in {"alone": (), "kept": ("--kept", "4"), "merged": ("--no-scope",)}.items():
        script("in_the_wild", *options, *more, "--results", str(tmp_path / "wild" / name))
    found = {
        name: json.loads((tmp_path / "wild" / f"{name}.json").read_text()) for name in ("alone", "kept", "merged")
    }
    assert all(len(document["edits"]) == 2 for document in found.values())
    assert found["alone"]["decisions"] and found["kept"]["strictness"] and not found["merged"]["decisions"]
    assert "What the scope decides" in (tmp_path / "wild" / "kept.md").read_text()


def test_all_neighbours_that_no_kept_edit_is_about_are_measured(script, tmp_path):
    model = scoped(build_model("llama"), make_tokenizer())
    model.save_pretrained(tmp_path / "editor")
    store = tmp_path / "store"
    script("in_the_wild", "--editor", str(tmp_path / "editor"), "--limit", "2", "--kept", "4", "--store", str(store),
           "--results", str(tmp_path / "wild"))  # fmt: skip
    options = ("--editor", str(tmp_path / "editor"), "--store", str(store), "--limit", "2")
    script("neighbours", *options, "--results", str(tmp_path / "neighbours"))
    found = json.loads((tmp_path / "neighbours.json").read_text())
    facts = list(read_counterfact(tmp_path / "facts_test.json"))
    kept = {edit.prompt for edit in EditStore(store).edits}
    about = [fact.subject for fact in facts if fact.prompt in kept]
    counted = {text for fact in facts[:2] for text in fact.neighborhood
               if not any(one in text for one in about if one != fact.subject)}  # fmt: skip
    assert found["edits"] == 4 and found["neighbours"] == len(counted) > 0
    assert set(found["stays"]) == {"neighbours", "behind text"}
    module = importlib.import_module("neighbours")
    model.edit(facts[0].prompt, "lima", max_steps=40)
    assert module.stays(model, [Query(facts[0].prompt), Query("the river of egypt is")]) == (0.5, 0.5)
