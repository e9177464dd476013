"""Loads altered files into a model, and compares what came of it with what another reader finds in them."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from hf_mend import Edit, EditorConfig, get_editable_model

from .altered import mutated
from .edits import random_edit
from .models import RECORDS, EditableModel, all_logits, build_model, editable, small_config
from .scope import scoped


EDITORS, EDITS = ["editor", "shards", "scoped-editor"], ["edits", "scoped-edits", "lora", "store", "scoped-store"]
NOT_ALTERED = ("README.md", ".lock")


@dataclass
class Material:
    """Folders of good files, and models to load them into."""

    place: Path
    tokenizer: PreTrainedTokenizerFast
    base: Any  # bare, for editors
    plain: EditableModel
    with_scope: EditableModel

    def model(self, folder: str) -> EditableModel:
        return self.with_scope if folder.startswith("scoped") else self.plain


def make_material(place: Path, tokenizer: PreTrainedTokenizerFast) -> Material:
    """Write an editor, the same in shards, one with a scope, edits of both, an adapter, and stores of both."""
    base = build_model("llama")
    torch.manual_seed(0)
    model = get_editable_model(copy.deepcopy(base), small_config(rank=2, whiten_rank=2), tokenizer)
    model.save_pretrained(place / "editor")
    model.save_pretrained(place / "shards", max_shard_size=3000)
    plain = editable(copy.deepcopy(base), tokenizer, rank=2)
    with_scope = scoped(copy.deepcopy(base), tokenizer, rank=2)
    with_scope.save_pretrained(place / "scoped-editor")
    prompts, targets = [r.prompt for r in RECORDS[:2]], [r.target for r in RECORDS[:2]]
    for name, one in (("", plain), ("scoped-", with_scope)):
        folder = place / f"{name}store"
        folder.mkdir()
        one.open_store(folder / "edits.store")
        one.edit(prompts, targets, max_steps=1, force=True)
        if name:
            one.exclude(one.edits[0].id, RECORDS[4].prompt)
        one.edit(RECORDS[2].prompt, RECORDS[2].target, max_steps=1, force=True)
        one.disable_edit(one.edits[1].id)
        one.undo()
        one.close_store()
        one.save_edits(place / f"{name}edits")
        one.undo_all()
    plain._active.replace([random_edit(plain, "a"), random_edit(plain, "b", seed=1)])
    plain.save_lora(place / "lora")
    plain.undo_all()
    return Material(place, tokenizer, base.train().requires_grad_(True), plain, with_scope)


def digest(model: torch.nn.Module) -> str:
    """All of a model that a failed load must leave alone."""
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole.update(name.encode() + value.numpy().tobytes())
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return whole.hexdigest() + str(flags) + str([p.requires_grad for p in model.parameters()])


def run_case(number: int, material: Material, kinds: Sequence[str] = (*EDITORS, *EDITS)) -> str:
    """
    Alter a file, load it and put it back.

    Returns:
        `str`: `"refused"`, `"loaded"`, or what was wrong.
    """
    rng = random.Random(f"hf_mend {number}")
    folder = material.place / rng.choice(kinds)
    path = rng.choice(sorted(p for p in folder.iterdir() if not p.name.endswith(NOT_ALTERED)))
    good = path.read_bytes()
    others = [p.read_bytes() for p in sorted(material.place.glob("*/*.safetensors"))]
    altered = mutated(rng, path, others)
    path.write_bytes(altered)
    try:
        return _outcome(folder, material)
    except AssertionError as error:
        return f"case {number}, {folder.name}/{path.name}: {error}"
    finally:
        path.write_bytes(good)
        material.base.train().requires_grad_(True)


def _outcome(folder: Path, material: Material) -> str:
    is_editor = folder.name in EDITORS
    model = material.model(folder.name)
    base = material.base if is_editor else model.base_model
    before = digest(base)
    try:
        if is_editor:
            _check_editor(EditableModel.from_pretrained(base, folder, material.tokenizer), folder)
            base.train().requires_grad_(True)
        else:
            _check_edits(_load(folder, model), folder, model)
        outcome = "loaded"
    except (ValueError, FileNotFoundError) as error:
        _check_error(error, folder)
        assert is_editor or (model.edits == [] and model._active.store is None), (
            "edits stay of a file that was refused"
        )
        outcome = "refused"
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}") from error
    finally:
        model.close_store()
        model.undo_all()
    assert digest(base) == before, "the model is another"
    return outcome


def _check_error(error: Exception, folder: Path) -> None:
    said = str(error)
    assert type(error) in (ValueError, FileNotFoundError), f"{type(error).__name__}: {said[:300]}"
    assert 20 < len(said) < 5000, f"a message of {len(said)} characters: {said[:300]}"
    said.encode()
    named = ("EditorConfig", "target_modules", "layers_pattern", "editor configuration", str(folder))
    assert any(word in said for word in named), f"names no file: {said[:300]}"


def _load(folder: Path, model: EditableModel) -> list[Edit]:
    if folder.name == "lora":
        return model.load_lora(folder)
    if folder.name.endswith("store"):
        return model.open_store(folder / "edits.store")
    return model.load_edits(folder)


def _check_editor(loaded: EditableModel, folder: Path) -> None:
    """What was loaded is what another reader finds in the files."""
    every = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    scope = load_file(folder / "scope.safetensors") if (folder / "scope.safetensors").exists() else {}
    for state, tensors in ((loaded.editor.state_dict(), {n: every[n] for n in every.keys() - scope.keys()}),):
        assert state.keys() == tensors.keys(), "the editor has other tensors than the file"
        assert all(torch.equal(value, tensors[name].float()) for name, value in state.items()), "other values"
        assert all(torch.isfinite(value).all() for value in state.values())
    if loaded.scope is not None:
        state = loaded.scope.state_dict()
        assert all(torch.equal(value, scope[name].float()) for name, value in state.items()), "another scope"
        assert all(torch.isfinite(value).all() for value in state.values())
    config = EditorConfig.from_dict(json.loads((folder / "editor_config.json").read_text()))
    config.task_type = config.task_type or "CAUSAL_LM"  # left open, it is found from the base
    assert loaded.editor_config == config, "the configuration is another"


def _check_edits(loaded: list[Edit], folder: Path, model: EditableModel) -> None:
    for edit in loaded:
        scope = [] if edit.scope is None else [edit.scope.keys, edit.scope.thresholds, edit.scope.excluded]
        for tensor in [*(x for pair in edit.updates.values() for x in pair), *scope]:
            assert torch.isfinite(tensor).all(), f"{edit.id} is not finite"
    if folder.name.endswith("edits"):
        with safe_open(str(folder / "edits.safetensors"), framework="pt") as file:
            described, names = json.loads(file.metadata()["edits"]), sorted(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        assert [edit.describe() for edit in loaded] == [Edit.from_file(one, _own(tensors, i), "").describe()
                                                        for i, one in enumerate(described)], "other edits"  # fmt: skip
        kept = {f"{i}.{n}.{s}": x for i, e in enumerate(loaded) for n, p in e.pairs().items()
                for s, x in zip("uv", p, strict=True)}  # fmt: skip
        assert sorted(kept) == names, "other tensors"
        assert all(torch.equal(kept[name], tensors[name]) for name in names), "other values"
    # They act, are in order to be saved again, and leave nothing.
    plain = _plain(model)
    all_logits(model, model.tokenizer, RECORDS[0].prompt + " rome")
    if model.scope is not None:
        model.which_edits(RECORDS[0].prompt)
    model.close_store()
    model.undo_all()
    assert torch.equal(all_logits(model, model.tokenizer), plain), "not the base's logits after undo_all"


def _own(tensors: dict[str, torch.Tensor], index: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    start = f"{index}."
    return {
        name[len(start) : -2]: (value, tensors[f"{name[:-1]}v"])
        for name, value in tensors.items()
        if name.startswith(start) and name.endswith(".u")
    }


def _plain(model: EditableModel) -> torch.Tensor:
    with model.disable_edits():
        return all_logits(model, model.tokenizer)


Case = Callable[[int], str]
