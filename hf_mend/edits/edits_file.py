"""The file of edits: how `edits.safetensors` is written and read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..hub.files import read_json, shortened
from .edit import Edit, is_description


_TENSOR_NAME = re.compile(r"(?P<index>0|[1-9][0-9]{0,8})\.(?P<layer>.+)\.(?P<side>[uv])")


def edits_from_tensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], source: str | Path
) -> list[Edit]:
    """
    Edits from a file's tensors (`<index>.<layer>.u` and `.v`) and its header.

    Raises:
        ValueError: The header is missing or does not fit the tensors; the message names the source.
    """
    described = read_json(metadata.get("edits", "null"), f"the header of {source}")
    broken = f"{source} is not a collection of edits, or its header was altered"
    if not isinstance(described, list) or not all(map(is_description, described)):
        raise ValueError(f"{broken}: {shortened(described)}; write it with save_edits")
    edits = [Edit.from_description(one, {}) for one in described]
    for name, tensor in tensors.items():
        found = _TENSOR_NAME.fullmatch(name)
        other = f"{found['index']}.{found['layer']}.{'v' if found['side'] == 'u' else 'u'}" if found else ""
        if not found or other not in tensors or int(found["index"]) >= len(edits):
            raise ValueError(f"{broken}: it has no pair or no edit for the tensor {name!r}; write it with save_edits")
        if found["side"] == "u":
            edits[int(found["index"])].updates[found["layer"]] = (tensor, tensors[other])
    return edits
