"""What a stranger's editor, edits or adapter may try: to reach other files, to load code, to cost much, to deceive."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import RECORDS, EditableModel, all_logits, build_model, editable, small_config
from typer.testing import CliRunner

from hf_mend import AutoEditableModel, EditStore, get_editable_model
from hf_mend.cli import app
from hf_mend.edits.edit import Edit


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- the base model that an editor names ----


def pushed(hub, llama, tokenizer, folder: Path, name: str = "me/base") -> Path:
    """A base in a folder, and an editor on the Hub that names a repository as its base."""
    llama.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = editable(llama, tokenizer)
    model.editor_config.base_model_name_or_path = name
    model.push_to_hub("me/editor")
    return folder / "base"


def test_a_folder_is_not_taken_for_the_repository_of_its_name(hub, llama, tokenizer, tmp_path, monkeypatch):
    base = pushed(hub, llama, tokenizer, tmp_path)
    (tmp_path / "here" / "me").mkdir(parents=True)
    base.rename(tmp_path / "here" / "me" / "base")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="names me/base there as its base model, and a path of the same name here"):
        AutoEditableModel.from_pretrained("me/editor")
    assert AutoEditableModel.from_pretrained("me/editor", "me/base").edit(RECORDS[0].prompt, "rome", max_steps=1)


def editor_beside_base(llama, tokenizer, folder: Path, **config: object) -> Path:
    llama.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = get_editable_model(llama, small_config(**config), tokenizer)
    model.editor_config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "editor")
    return folder / "editor"


def test_pickled_weights_are_loaded_for_their_owner_alone(llama, tokenizer, tmp_path):
    editor = editor_beside_base(llama, tokenizer, tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "base" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoEditableModel.from_pretrained(editor)
    assert AutoEditableModel.from_pretrained(editor, use_safetensors=False).edits.ids == []
    assert AutoEditableModel.from_pretrained(editor, tmp_path / "base").edits.ids == []


@pytest.mark.parametrize(
    "field",
    ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_experts_implementation"],
)
@pytest.mark.parametrize("options", [{}, {"attn_implementation": "eager"}])
def test_kernels_that_a_base_names_are_not_fetched(llama, tokenizer, tmp_path, field, options):
    editor = editor_beside_base(llama, tokenizer, tmp_path)
    changed(tmp_path / "base" / "config.json", **{field: "stranger/kernel"})
    try:
        model = AutoEditableModel.from_pretrained(editor, **options)
    except ValueError as error:
        assert "asks for the kernel 'stranger/kernel' from the Hub, which is code" in str(error)
    else:
        assert model.config._attn_implementation in ("sdpa", "eager")


# ---- what an editor may cost ----


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (
            {"method": "lora"},
            {"rank": 65536},
            "edits of rank 65536, and no weight that it edits has more than 32",
        ),
        ({"method": "ft"}, {"num_steps": 100_000}, "asks for up to 100000 passes an edit"),
        ({"method": "ft-kl"}, {"num_steps": 1000, "kl_texts": 1000}, "asks for up to 1001000 passes an edit"),
        ({"method": "rome"}, {"num_steps": 99_999}, r"pass EditorConfig\(num_steps="),
    ],
)
def test_an_editor_costs_no_more_than_its_base_warrants(llama, tokenizer, tmp_path, config, values, message):
    get_editable_model(llama, small_config(**config), tokenizer).save_pretrained(tmp_path / "editor")
    EditableModel.from_pretrained(build_model("llama"), tmp_path / "editor", tokenizer)
    changed(tmp_path / "editor" / "editor_config.json", **values)
    with pytest.raises(ValueError, match=message):
        EditableModel.from_pretrained(build_model("llama"), tmp_path / "editor", tokenizer)


# ---- links out of a folder ----


def test_a_link_out_of_a_folder_is_neither_read_nor_published(hub, llama, tokenizer, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("my secret")
    model, folder = editable(llama, tokenizer), tmp_path / "editor"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)
    (folder / "notes.txt").symlink_to(secret)
    refused = CliRunner().invoke(app, ["push", str(folder), "me/editor"])
    assert refused.exit_code == 2 and "README.md is a link out of the folder" in " ".join(refused.output.split())
    model.save_pretrained(folder)
    card = folder / "README.md"
    assert not card.is_symlink() and "my secret" not in card.read_text() and secret.read_text() == "my secret"
    assert (folder / "notes.txt").is_symlink() and (folder / "notes.txt").read_text() == "my secret"
    assert CliRunner().invoke(app, ["push", str(folder), "me/editor"]).exit_code == 0
    assert not any(b"my secret" in value for value in hub.repositories["me/editor"].files().values())


# ---- texts that are shown ----

NASTY = "me/base\n\n# Heading\n<img src=x onerror=alert(1)>\n<!-- hf_mend:metrics -->\n| fine | 1.000 |\n`x` "
NASTY += "\x1b[2J\x1b]0;t\x07"


def test_a_card_has_no_structure_of_a_strangers_making(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.editor_config.base_model_name_or_path = NASTY
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    lines = text.split("\n")
    assert "# Heading" not in lines and lines.count("<!-- hf_mend:metrics -->") == 1
    assert not any(line.startswith(("<img", "| fine")) for line in lines) and "\x1b" not in text
    title = next(line for line in lines if line.startswith("# An editor for"))
    assert title.startswith("# An editor for `me/base # Heading <img") and title.count("`") == 2


def test_a_terminal_gets_no_escapes(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.editor_config.base_model_name_or_path = NASTY
    model.save_pretrained(tmp_path / "editor")
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "editor")])
    assert shown.exit_code == 0 and "\x1b" not in shown.output and "\x07" not in shown.output
    assert "base model: me/base # Heading" in shown.output and "\\x1b[2J" in shown.output
    changed(tmp_path / "editor" / "editor_config.json", method="\x1b[2J")
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "editor")])
    assert shown.exit_code == 2 and "\x1b" not in shown.output


# ---- edits and adapters ----


def rewritten(path: Path, change) -> None:
    """A safetensors file with other metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["edits"] = json.dumps(change(json.loads(metadata["edits"])))
    save_file(load_file(path), path, metadata)


@pytest.mark.parametrize("how", ["ranks", "enabled", "replaces", "prompt", "dropped"])
def test_an_adapter_hides_nothing_that_peft_applies(llama, tokenizer, tmp_path, how):
    model = editable(llama, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1, force=True)
    model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1, force=True)
    model.save_lora(tmp_path, uniform_rank=True)
    again = editable(build_model("llama"), tokenizer)
    again.load_lora(tmp_path)
    torch.testing.assert_close(all_logits(again, tokenizer), all_logits(model, tokenizer), rtol=1e-4, atol=1e-4)

    def change(edits):
        if how == "ranks":
            edits[1]["ranks"] = {name: rank - 1 for name, rank in edits[1]["ranks"].items()}
        elif how == "enabled":
            edits[0]["enabled"] = False
        elif how == "replaces":
            edits[1]["replaces"] = [edits[0]["id"]]
        elif how == "prompt":
            edits[1]["prompt"] = edits[0]["prompt"]
        return edits[:1] if how == "dropped" else edits

    rewritten(tmp_path / "adapter_model.safetensors", change)
    again.undo_all()
    with pytest.raises(ValueError, match="which act in PEFT; the header was altered"):
        again.load_lora(tmp_path)
    assert len(again.edits) == 0


def test_half_a_character_is_not_loaded(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1, force=True)
    model.open_store(tmp_path / "store")
    model.undo_all()
    model.close_store()
    again = editable(build_model("llama"), tokenizer)
    again.edit("the \U0001f600 is", RECORDS[0].target, max_steps=1, force=True)
    again.save_edits(tmp_path)
    model.load_edits(tmp_path)
    model.undo_all()

    def change(edits):
        edits[0]["prompt"] = "the \ud83d is"
        return edits

    rewritten(tmp_path / "edits.safetensors", change)
    with pytest.raises(ValueError, match="holds half of a character"):
        model.load_edits(tmp_path)
    assert len(model.edits) == 0


def test_an_edit_with_half_a_character_leaves_a_store_as_it_was(tmp_path):
    store = EditStore(tmp_path / "store")
    store.append([Edit("a", "p", "t", {})])
    data = (tmp_path / "store").read_bytes()
    with pytest.raises(ValueError):
        store.append([Edit("b", "\ud800", "t", {})])
    assert (tmp_path / "store").read_bytes() == data
    store.append([Edit("c", "p", "t", {})])
    assert EditStore(tmp_path / "store").edits.ids == ["a", "c"]


def test_a_large_configuration_takes_little_time(llama, tokenizer, tmp_path):
    values = {f"m{index}": ["x" * 50] * 10 for index in range(40_000)}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **values}))
    begin = time.process_time()
    with pytest.raises(ValueError):
        editable(llama, tokenizer).load_lora(folder)
    assert time.process_time() - begin < 10
