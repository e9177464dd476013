"""What tests of methods share: shapes, factors, searches and their oracles."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from hf_mend import EditorConfig
from hf_mend.bases.weights import weight_matrix
from hf_mend.data.encoding import Query
from hf_mend.editing.calibration_text import observe_calibration_text
from hf_mend.editing.context import EditingContext
from hf_mend.methods import get_method
from support.models import EditableModel, fitting, small_config


def gradients(model: EditableModel, query: Query) -> dict[str, torch.Tensor]:
    """Autograd's own gradient of each edited weight, `(d_out, d_in)`."""
    base = copy.deepcopy(model.base_model).requires_grad_(True)
    rows = model.encoder([query])
    logits = base(**rows.inputs).logits[rows.positions]
    torch.nn.functional.cross_entropy(logits, rows.next_tokens[rows.positions], reduction="sum").backward()
    found = {}
    for target in model.targets:
        module = base.get_submodule(target.name)
        gradient = module.weight.grad
        found[target.name] = gradient.T if type(module).__name__ == "Conv1D" else gradient
        assert found[target.name].shape == weight_matrix(module).shape == target.shape
    return found


SHAPES = {"a.fc1": (12, 8), "b.fc1": (12, 8), "a.fc2": (8, 12)}


def factors(edits=2, seq=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, (d_out, d_in) in SHAPES.items():
        x = torch.randn(edits, seq, d_in, generator=generator)
        delta = torch.randn(edits, seq, d_out, generator=generator)
        delta[0, 3:] = 0
        x[0, 3:] = 0
        out[name] = (x, delta)
    return out


NEVER = 1e-9  # a stop_loss that is not reached: as many steps as are asked for


def searching(base, tokenizer, method, **options) -> EditableModel:
    values = fitting(method, edit_lr=0.01, rank=2, num_steps=4, stop_loss=NEVER, kl_texts=3)
    return EditableModel(base, small_config(method=method, **{**values, **options}), tokenizer)


def row(model, record):
    return model.encoder([Query(record.prompt, record.target)])


def nll(copied, rows) -> torch.Tensor:
    """Of the target's tokens, summed, by the plain model."""
    labels = rows.next_tokens[rows.positions]
    return nn.functional.cross_entropy(copied(**rows.inputs).logits[rows.positions], labels, reduction="sum")


def inputs_of(model, target, rows) -> torch.Tensor:
    """What enters a layer of the plain model, `(rows, seq, d_in)`."""
    found = []
    handle = target.module.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    with torch.no_grad():
        model.base_model(**rows.inputs)
    handle.remove()
    return found[0]


def second_moment(model, target, ridge, more=()) -> np.ndarray:
    """Of the packaged lines and more texts, by hand."""
    texts = get_method("ft-kl")(EditorConfig(method="ft-kl"), model.editor.shapes)
    observe_calibration_text(EditingContext(model.split, model.targets, texts), model.encoder, more)
    kept = []
    for rows in texts._texts:
        decoder = "decoder_input_ids" in rows.inputs and target.side == "decoder"
        mask = rows.positions if decoder else rows.inputs["attention_mask"].bool()
        kept.append(inputs_of(model, target, rows)[mask].double().numpy())
    x = np.concatenate(kept)
    moment = x.T @ x / len(x)
    return moment + ridge * np.trace(moment) / len(moment) * np.eye(len(moment))
