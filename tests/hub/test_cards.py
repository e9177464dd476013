"""The card: from the template, with what was measured, and never over somebody's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from support.models import RECORDS, small_config
from support.paths import ROOT

from hf_mend import EditorConfig, EditorTrainer, EditorTrainingArguments, get_editable_model
from hf_mend.hub.cards import (
    METRICS,
    WILD_METRICS,
    CardNotes,
    set_metadata,
    update_card,
    use_section,
    with_sections_of,
    write_card,
)
from hf_mend.hub.files import read_tensors
from hf_mend.hub.plots import can_draw


CARDS = ROOT / "model_cards"
RESULTS = ROOT / "benchmarks" / "results"
EDITORS = sorted(path for path in CARDS.glob("*") if path.is_dir())
MEASURED = {"all": {"edits": 7.0, "edit_success": 0.98765, "generality": 0.5, "unrelated_kl": 0.1, "score": 0.7}}


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def results_of(folder: Path) -> dict[tuple[str, str], float]:
    """(group of facts, metric) -> value, as the Hub's own reader of front matter finds them."""
    data = ModelCard.load(folder / "README.md").data
    return {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results or []}


def test_a_new_card_names_base_layers_and_settings(tmp_path):
    write_card(tmp_path, EditorConfig(base_model_name_or_path="me/model", task_type="SEQ_2_SEQ_LM", rank=7), ["a.fc1"])
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data["library_name"], data.base_model) == ("hf-mend", "me/model")
    assert data.tags == ["model-editing", "knowledge-editing", "mend"]
    assert data.eval_results is None
    text = text_of(tmp_path)
    assert "- `a.fc1`" in text and "| `rank` | `7` |" in text
    assert "Nothing was measured" in text
    assert "$" not in text
    assert "num_steps" not in text, "MEND does not look at it"


def test_a_base_that_is_a_folder_is_no_model_of_the_hub(tmp_path):
    write_card(tmp_path, EditorConfig(base_model_name_or_path="/somewhere/here/model"), ["a"])
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_metadata_is_the_users_to_give(tmp_path):
    given = {"license": "mit", "language": ["en"], "datasets": ["me/facts"], "tags": ["mend", "mine"]}
    write_card(tmp_path, EditorConfig(base_model_name_or_path="me/model"), ["a"], metadata=given)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.language, data.datasets) == ("mit", ["en"], ["me/facts"])
    assert data.tags == ["model-editing", "knowledge-editing", "mend", "mine"]
    write_card(tmp_path, EditorConfig(), ["a"], CardNotes(measured=MEASURED), {"license": "apache-2.0"})
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.datasets, data.base_model) == ("apache-2.0", ["me/facts"], "me/model")
    assert results_of(tmp_path)["all", "generality"] == 0.5, "the marked section outlives a change of the fields"


def test_front_matter_that_cannot_be_read_is_named_and_kept(tmp_path):
    path = tmp_path / "README.md"
    for text in ("no front matter", "---\n: : :\n  - [\n---\n", "---\n- a list\n---\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="README.md.*front matter"):
            set_metadata(path, {"license": "mit"})
        assert path.read_text() == text


def test_only_marked_sections_are_replaced(tmp_path):
    write_card(tmp_path, EditorConfig(), ["a"])
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("## Training", "My own words.\n\n## Training"))
    update_card(tmp_path, {"metrics": "success \\1 0.99", "nothing": "x"})
    write_card(tmp_path, EditorConfig(rank=3), ["b"])
    text = path.read_text()
    assert "My own words." in text
    assert "success \\1 0.99" in text
    assert "Nothing was measured" not in text
    assert "- `b`" in text
    assert "- `a`" not in text
    assert "| `rank` | `3` |" in text


def test_a_card_of_the_users_own_stays_to_the_byte(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Mine\n\nNo marks.\n")
    write_card(tmp_path, EditorConfig(), ["a"], CardNotes({"steps": "3"}, [], MEASURED))
    assert path.read_text() == "# Mine\n\nNo marks.\n"


def test_what_was_measured_is_in_table_and_model_index(tmp_path):
    write_card(tmp_path, EditorConfig(), ["a"], CardNotes(measured=MEASURED, command="measure --it again"))
    text = text_of(tmp_path)
    assert "| facts | edits | edit success | generality | unrelated kl |" in text
    assert "| all | 7 | 0.988 | 0.500 | 0.100 |" in text
    assert "```bash\nmeasure --it again\n```" in text
    expected = {("all", "edit_success"): 0.9877, ("all", "generality"): 0.5, ("all", "unrelated_kl"): 0.1}
    assert results_of(tmp_path) == expected
    write_card(tmp_path, EditorConfig(), ["a"], CardNotes(training={"steps": "9"}))
    assert results_of(tmp_path) == {}, "figures of an editor that was here before say nothing of this one"
    assert "Nothing was measured" in text_of(tmp_path) and "| steps | 9 |" in text_of(tmp_path)


@pytest.mark.parametrize(
    ("task_type", "task"), [("CAUSAL_LM", "text-generation"), ("SEQ_2_SEQ_LM", "text2text-generation")]
)
def test_the_model_index_names_the_hubs_task(tmp_path, task_type, task):
    write_card(tmp_path, EditorConfig(task_type=task_type), ["a"], CardNotes(measured=MEASURED))
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {result.task_type for result in results} == {task}


def test_marked_sections_go_over_from_one_card_to_another(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "there").mkdir()
    write_card(tmp_path / "there", EditorConfig(), ["a"])
    write_card(tmp_path / "new", EditorConfig(), ["b"], CardNotes(measured=MEASURED))
    update_card(tmp_path / "new", {"use": use_section("me/editor")})
    words = text_of(tmp_path / "there").replace("# An editor", "# My editor")
    (tmp_path / "there" / "README.md").write_text(with_sections_of(words, text_of(tmp_path / "new")))
    text = text_of(tmp_path / "there")
    assert "# My editor" in text and "- `b`" in text and 'from_pretrained("me/editor")' in text
    assert results_of(tmp_path / "there") == results_of(tmp_path / "new") != {}


def test_a_trainer_hands_its_settings_and_its_last_measurement_to_the_card(llama, tokenizer, tmp_path):
    model = get_editable_model(llama, small_config(rank=4), tokenizer)
    arguments = EditorTrainingArguments(str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=3,
        report_to=[], logging_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="no",
        disable_tqdm=True)  # fmt: skip
    trainer = EditorTrainer(model, arguments, RECORDS, RECORDS[:4])
    trainer.train()
    model.save_pretrained(tmp_path / "mine", card_data={"license": "mit"})
    text = text_of(tmp_path / "mine")
    for row in ("| facts | 8 |", "| steps | 2 |", "| facts a step | 3 |", "| learning rate | 0.001, linear |"):
        assert row in text
    assert "CPU cores" in text and "minutes |" in text
    last = [row for row in trainer.state.log_history if "eval_score" in row][-1]
    assert last["step"] == 2
    values = results_of(tmp_path / "mine")
    names = [name for name in METRICS if f"eval_{name}" in last]
    assert values == {("evaluation facts", name): round(last[f"eval_{name}"], 4) for name in names}
    for name in ("training.png", "metrics.png"):
        assert (tmp_path / "mine" / name).is_file() == (f"({name})" in text) == can_draw()

    trainer.args.max_steps, trainer.args.eval_strategy = 3, "no"
    trainer.train()
    model.save_pretrained(tmp_path / "mine")
    assert results_of(tmp_path / "mine") == {}, "these weights were not measured"
    assert "| steps | 3 |" in text_of(tmp_path / "mine")


@pytest.mark.parametrize("folder", EDITORS, ids=lambda path: path.name)
def test_a_published_editor_is_whole_and_its_card_says_what_was_measured(folder):
    if not (folder / "editor.safetensors").is_file():
        pytest.skip("a source distribution has the published cards without the weights")
    config = EditorConfig.from_json_file(folder / "editor_config.json")
    read_tensors(folder / "editor.safetensors")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10e6
    assert config.base_fingerprint is not None
    found = json.loads((RESULTS / f"{folder.name}.json").read_text())
    tables = [(found["metrics"], METRICS), (found.get("wild", {}), WILD_METRICS)]
    assert found["metrics"]
    expected = {
        (title, name): round(metrics[name], 4)
        for measured, titles in tables
        for title, metrics in measured.items()
        for name in titles
        if name in metrics
    }
    assert results_of(folder) == expected
    lines = text_of(folder).splitlines()
    for measured, titles in tables:
        names = [name for name in titles if any(name in metrics for metrics in measured.values())]
        if measured:
            assert "| facts | edits | " + " | ".join(titles[name] for name in names) + " |" in lines
        for title, metrics in measured.items():
            cells = [f"{metrics[name]:.3f}" if name in metrics else "" for name in names]
            assert f"| {title} | {metrics['edits']:.0f} | " + " | ".join(cells) + " |" in lines


@pytest.mark.parametrize("folder", EDITORS, ids=lambda path: path.name)
def test_a_published_card_is_as_the_hub_wants_it(folder):
    config = EditorConfig.from_json_file(folder / "editor_config.json")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == config.base_model_name_or_path
    assert card.data["library_name"] == "hf-mend"
    assert card.data.license and config.method in card.data.tags
    name, results = model_index_to_eval_results(yaml.safe_load(card.data.to_yaml())["model-index"])
    assert name and results
    assert isinstance(card.data, ModelCardData)
    text = text_of(folder)
    for heading in ("Use", "What it edits", "Measured", "Intended use and limits", "Training", "Configuration"):
        assert f"\n## {heading}\n" in text
    for layer in config.base_fingerprint["layers"]:
        assert f"- `{layer}`" in text
    for picture in (line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")):
        assert (folder / picture).is_file()
    assert "```bash" in text, "the command that measures it again"


@pytest.mark.skipif(not can_draw(), reason="needs matplotlib")
def test_figures_in_the_wild_come_first_with_the_curve_of_strictness(tmp_path):
    points = [(0.0, 0.9, 0.3), (0.1, 0.8, 0.1), (0.2, 0.6, 0.0)]
    curve = [
        {"strictness": s, "prompt": right, "recall": right, "wrong edit": 0.0, "fired": fired, "neighbours": fired}
        for s, right, fired in points
    ]
    wild = {"all": {"edits": 7.0, "prompt": 0.9, "behind text": 0.8, "unrelated: bits": 1.0, "repeats": 0.02}}
    write_card(tmp_path, EditorConfig(), [], CardNotes(measured=MEASURED, wild=wild, strictness=curve))
    text = text_of(tmp_path)
    assert text.index("As people meet edits") < text.index("| all | 7 | 0.900 | 0.800 | 1.000 | 0.020 |")
    assert text.index("0.020 |") < text.index("Teacher-forced, as the field") < text.index("| 0.988 |")
    assert "strictness.png" in text and (tmp_path / "strictness.png").stat().st_size > 1000
    named = {(one.metric_name, one.metric_value) for one in ModelCard.load(tmp_path / "README.md").data.eval_results}
    assert {("unrelated, bit for bit", 1.0), ("prompt", 0.9), ("edit success", 0.9877)} <= named
