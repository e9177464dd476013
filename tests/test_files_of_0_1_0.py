"""
What version 0.1.0 wrote still loads, and a model with it answers as that version's did, bit for bit: editors, edits,
stores and LoRA adapters in `fixtures/0.1.0`, which `write_fixtures.py` there has made.

Bits are compared where the machine is like the one that wrote the files; elsewhere matrix products may be summed up in
another order, and figures are compared within rounding.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import EditableModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from hf_mend import Edit, EditRecord, EditResult


FIXTURES = Path(__file__).parent / "fixtures" / "0.1.0"
BASES = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
EDITORS = {
    "llama": ["mend", "mend-plain", "malmen", "ke", "enn", "gradient", "ultraedit", "memit", "rome", "lora", "ft-kl"],
    "t5": ["mend", "malmen", "ke", "enn", "gradient", "memit", "lora"],
}
# Folders with edits, and the editor of the model that loads them.
EDITS = {
    "llama": {"edits": "mend", "edits-malmen": "malmen", "edits-enn": "enn", "edits-lora": "gradient"},
    "t5": {"edits": "mend"},
}
# Methods whose further edits are found by Adam: torch's own since 0.1.0, which rounds in another order.
BY_ADAM = {"memit", "rome", "lora", "ft-kl"}
STORES = {"llama": "gradient", "t5": "mend"}
ADAPTERS = {"llama": {"lora": "mend", "lora-truncated": "gradient"}, "t5": {"lora": "mend"}}
TEXT = "the capital of peru is"

Tensors = dict[str, torch.Tensor]
Found = tuple[Tensors, dict[str, Any]]


@cache
def tokenizer(base: str) -> Any:
    """The base model's tokenizer."""
    return AutoTokenizer.from_pretrained(FIXTURES / base / "base")


def load_base(base: str) -> PreTrainedModel:
    """The base model as it was saved."""
    model: PreTrainedModel = BASES[base].from_pretrained(FIXTURES / base / "base", dtype=torch.float32)
    return model


def load_editor(base: str, editor: str) -> EditableModel:
    """The base model with an editor's folder."""
    folder = FIXTURES / base / "editors" / editor
    return EditableModel.from_pretrained(load_base(base), folder, tokenizer(base)).eval()


def logits(model: EditableModel) -> torch.Tensor:
    """What the model says to a text, at its last two tokens."""
    inputs = dict(tokenizer(model.config.model_type)(TEXT, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, 5, 9]])
    with torch.no_grad():
        said: torch.Tensor = model(**inputs).logits
    return said[:, -2:].clone()


def of_result(result: EditResult, ids: list[str]) -> dict[str, Any]:
    """A result without its time; the ids of edits that are not in a file are random, so they are left out too."""
    values = dataclasses.asdict(result)
    newer = ("nbytes", "longer_word", "taken_back", "lost")
    for name in ("seconds", "id", *newer):
        del values[name]
    assert values.pop("scope") is None  # the version before had no scopes
    values["superseded"] = values["superseded"] if values["superseded"] in ids else values["superseded"] is not None
    return values


def of_edit(edit: Edit) -> dict[str, Any]:
    """An edit without its matrices."""
    names = ("id", "prompt", "target", "metadata", "enabled", "replaces", "rank")
    renamed = {"needs": edit.requires, "support": edit.is_base_delta}
    return {name: getattr(edit, name) for name in names} | renamed | {"layers": list(edit.updates)}


def go_on(model: EditableModel, tensors: Tensors, values: dict[str, Any]) -> Found:
    """Edits a loaded model further: one edit with a subject, then two, of which one takes an earlier one's place."""
    ids = model.edits.ids
    record = EditRecord("the seat of egypt is", "nairobi town", subject="egypt")
    values["single"] = of_result(model.edit(record), ids)
    tensors["after a further edit"] = logits(model)
    both = model.edit([TEXT, "the river of japan is"], ["cairo town", "oslo"], max_steps=1)
    values["both"] = [of_result(one, ids) for one in both]  # type: ignore[union-attr]
    tensors["after two more"] = logits(model)
    return tensors, values


def editor_case(base: str, editor: str) -> Found:
    """An editor's folder."""
    model = load_editor(base, editor)
    state = {f"state.{name}": value.clone() for name, value in model.editor.state_dict().items()}
    # The file itself says what the tensors are; here it is enough that all are there and none is another.
    summary = {"state": {name: [list(value.shape), str(value.dtype)] for name, value in state.items()}}
    tensors = {"sums": torch.stack([value.double().sum() for value in state.values()])} if state else {}
    return go_on(model, {**tensors, "loaded": logits(model)}, summary)


def edits_case(base: str, name: str, editor: str) -> Found:
    """A folder that `save_edits` wrote."""
    model = load_editor(base, editor)
    edits = model.load_edits(FIXTURES / base / name)
    values = {"edits": [of_edit(edit) for edit in edits], "active": [edit.id for edit in model.edits.active]}
    tensors = {"loaded": logits(model)}
    last = model.undo()
    tensors["without the last"] = logits(model)
    if model.edits and model.edits[-1].replaces:
        model.undo()
        tensors["without the compression"] = logits(model)
        model.enable_edit(*[edit.id for edit in model.edits if not edit.enabled])
        tensors["with all turned on"] = logits(model)
    values["undone"] = last.id
    return go_on(model, tensors, values)


def store_case(base: str, editor: str, folder: Path) -> Found:
    """A store, which is copied first: a further edit goes into it."""
    path = folder / "edits.store"
    shutil.copy(FIXTURES / base / "edits.store", path)
    model = load_editor(base, editor)
    edits = model.open_store(path)
    values = {"edits": [of_edit(edit) for edit in edits], "active": [edit.id for edit in model.edits.active]}
    found = go_on(model, {"loaded": logits(model)}, values)
    model.undo()
    model.close_store()
    other = load_editor(base, editor)
    other.open_store(path)
    found[0]["opened again"] = logits(other)
    return found


def adapter_case(base: str, name: str, editor: str) -> Found:
    """A LoRA adapter's folder."""
    model = load_editor(base, editor)
    edits = model.load_lora(FIXTURES / base / name)
    described = [of_edit(edit) for edit in edits]
    for one in described:  # an adapter that does not say its edits is one edit, whose id is made when it is loaded
        if not one["prompt"]:
            del one["id"]
    return go_on(model, {"loaded": logits(model)}, {"edits": described})


def base_case(base: str) -> Found:
    """The base model alone, and edited without a configuration."""
    model = EditableModel(load_base(base), None, tokenizer(base)).eval()
    return go_on(model, {"loaded": logits(model)}, {})


def cases() -> Iterator[tuple[str, Callable[[Path], Found]]]:
    """Everything that was kept, by name; a function gets a folder to write to."""
    for base in BASES:
        yield f"{base}/base", lambda _, base=base: base_case(base)
        for editor in EDITORS[base]:
            yield f"{base}/editor {editor}", lambda _, base=base, editor=editor: editor_case(base, editor)
        for name, editor in EDITS[base].items():
            yield f"{base}/{name}", lambda _, base=base, name=name, editor=editor: edits_case(base, name, editor)
        yield f"{base}/store", lambda folder, base=base: store_case(base, STORES[base], folder)
        for name, editor in ADAPTERS[base].items():
            yield f"{base}/{name}", lambda _, base=base, name=name, editor=editor: adapter_case(base, name, editor)


CASES = dict(cases())


def machine() -> dict[str, str]:
    """What the order of a matrix product's additions depends on."""
    info = Path("/proc/cpuinfo")
    names = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), "")
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": model or platform.processor(), "instructions": capability}


@cache
def expected() -> tuple[Tensors, dict[str, Any]]:
    """What version 0.1.0 came to: tensors by `case/name`, other values by case."""
    values = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
    return load_file(FIXTURES / "expected.safetensors"), values


def same(one: Any, other: Any, exactly: bool) -> bool:
    """Whether two JSON values are the same, or their numbers close."""
    if isinstance(one, float) and isinstance(other, float) and not exactly:
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-5)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name], exactly) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(*pair, exactly) for pair in zip(one, other, strict=True))
    return bool(one == other)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """With as many threads as the files were written with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_a_model_with_files_of_the_version_before_answers_as_it_did(name: str, tmp_path: Path) -> None:
    before, plain = expected()
    exactly = plain["machine"] == machine()
    by_adam = name.partition("/editor ")[2] in BY_ADAM
    tensors, values = CASES[name](tmp_path)
    wanted = {key.removeprefix(f"{name}/"): value for key, value in before.items() if key.startswith(f"{name}/")}
    assert tensors.keys() == wanted.keys()
    for key, value in tensors.items():
        assert value.dtype == wanted[key].dtype, key
        if exactly and not (by_adam and key.startswith("after")):
            assert torch.equal(value, wanted[key]), key
        else:
            # Adam's first steps have the gradients' signs, so that rounding near zero moves a weight by a whole step.
            torch.testing.assert_close(value, wanted[key], rtol=1e-3, atol=1e-3 if by_adam else 1e-4, msg=key)
    now = json.loads(json.dumps(values))
    for key, value in plain["cases"][name].items():
        assert same(now[key], value, exactly and not by_adam), (key, now[key], value)


def test_what_is_in_the_files_matters() -> None:
    before, plain = expected()
    for base in BASES:
        un_edited = before[f"{base}/base/loaded"]
        changed = [f"{base}/{name}" for name in ("store", *EDITS[base], *ADAPTERS[base])]
        assert all(not torch.equal(before[f"{name}/loaded"], un_edited) for name in changed)
        enabled = [edit["enabled"] for edit in plain["cases"][f"{base}/edits"]["edits"]]
        assert False in enabled and True in enabled
