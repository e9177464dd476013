"""Names of layers in files of earlier versions of transformers, which nested some models otherwise."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key


def current_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """
    Return the name that each of some layers has in a model now: its own, or the one that transformers gives weights of
    its older name. A layer of neither name keeps its own.

    Args:
        model (`nn.Module`): The model.
        names (`Iterable[str]`): The layers' names.
    """
    present = {name for name, _ in model.named_modules()}
    found = {name: name for name in names}
    if not isinstance(model, PreTrainedModel) or found.keys() <= present:
        return found
    mapping = get_model_conversion_mapping(model, getattr(model, "_checkpoint_conversion_mapping", None))
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    for name in found.keys() - present:
        renamed = rename_source_key(f"{name}.weight", renamings, [])[0].removesuffix(".weight")
        found[name] = renamed if renamed in present else name
    return found
