"""The file of edits: reading and writing `edits.safetensors`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..hub.atomic import made_folder
from ..hub.files import (
    EDIT_DTYPES,
    EDITS_NAME,
    files_like,
    read_json,
    read_json_object,
    read_tensors,
    shortened,
    write_tensors,
)
from .edit import Edit, is_description
from .low_rank import Update


_TENSOR_NAME = re.compile(r"(?P<index>0|[1-9][0-9]{0,8})\.(?P<layer>.+)\.(?P<side>[uv])")


def write_edits_file(folder: str | Path, edits: Sequence[Edit], base_fingerprint: Mapping[str, Any]) -> None:
    """
    Write edits to `edits.safetensors` in a folder, all or nothing: the tensors, [`Edit.pairs`], as `<index>.<name>.u`
    and `.v`, the descriptions of the edits and of their base model as JSON in the header.

    Args:
        folder (`str` or `Path`): The folder; made if missing.
        edits (`Sequence[Edit]`): The edits.
        base_fingerprint (`Mapping[str, Any]`): The fingerprint of the base model that the edits are for, as
            [`~hf_mend.bases.fingerprint.fingerprint_of`] gives it.
    """
    tensors = {
        f"{index}.{name}.{side}": factor
        for index, edit in enumerate(edits)
        for name, pair in edit.pairs().items()
        for side, factor in zip("uv", pair, strict=True)
    }
    described = json.dumps([edit.describe() for edit in edits])
    made_folder(Path(folder))
    metadata = {"edits": described, "base_fingerprint": json.dumps(base_fingerprint)}
    write_tensors(Path(folder) / EDITS_NAME, tensors, metadata)


def has_edits(folder: str | Path) -> bool:
    """
    Whether a folder holds saved edits, whole or not.

    Args:
        folder (`str` or `Path`): The folder; it need not exist.
    """
    return any(any(Path(folder).glob(pattern)) for pattern in files_like(EDITS_NAME))


def read_edits_file(path: str | Path) -> tuple[list[Edit], dict[str, Any] | None]:
    """
    Read a file that [`write_edits_file`] wrote.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `tuple`: The edits, bit for bit as they were written, and the fingerprint of their base model, if there is one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its header is missing or does not fit its tensors.
    """
    tensors, metadata = read_tensors(path, dtypes=EDIT_DTYPES)
    described = read_json(metadata.get("edits", "null"), f"the header of {path}")
    broken = f"{path} is not a collection of edits, or its header was altered"
    if not isinstance(described, list) or not all(map(is_description, described)):
        raise ValueError(f"{broken}: {shortened(described)}; write it with save_edits")
    pairs: list[dict[str, Update]] = [{} for _ in described]
    for name, tensor in tensors.items():
        found = _TENSOR_NAME.fullmatch(name)
        other = f"{found['index']}.{found['layer']}.{'v' if found['side'] == 'u' else 'u'}" if found else ""
        if not found or other not in tensors or int(found["index"]) >= len(pairs):
            raise ValueError(f"{broken}: it has no pair or no edit for the tensor {name!r}; write it with save_edits")
        if found["side"] == "u":
            pairs[int(found["index"])][found["layer"]] = (tensor, tensors[other])
    edits = [Edit.from_file(one, own, str(path)) for one, own in zip(described, pairs, strict=True)]
    stored = metadata.get("base_fingerprint")
    return edits, None if stored is None else read_json_object(stored, f"{path}: its base_fingerprint")
