"""An edit as a record of a store: its tensors as safetensors, and its description in their header."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import save

from ..hub.files import EDIT_DTYPES, check_entries, header_size, read_header, read_json_object, shortened
from .edit import Edit, is_description
from .low_rank import Update


_METADATA = b'{"__metadata__":{"edit":'
_LARGE = 1 << 16  # too large for the cache of headers
_DECODER = json.JSONDecoder()
_Layout = tuple[list[tuple[str, torch.dtype, int, int, list[int]]], int]


def packed(edit: Edit) -> bytes:
    """Encode an edit as safetensors: [`Edit.pairs`] as `<name>.u` and `.v`, and the description in the header."""
    tensors = {
        f"{name}.{side}": tensor.detach().to("cpu").contiguous()
        for name, pair in edit.pairs().items()
        for side, tensor in zip("uv", pair, strict=True)
    }
    return save(tensors, metadata={"edit": json.dumps(edit.describe(), ensure_ascii=False)})


def unpacked(payload: memoryview, where: str) -> Edit:
    """
    Decode an edit, its factors views of the payload.

    Args:
        payload (`memoryview`): What [`packed`] gave.
        where (`str`): Its name in messages.

    Raises:
        ValueError: It is no edit, or a value is not finite.
    """
    end = 8 + header_size(bytes(payload[:8]), len(payload), where)
    metadata, layout = _read_header(bytes(payload[8:end]), where)
    described = read_json_object(metadata.get("edit", "null"), where)
    if not is_description(described):
        raise ValueError(f"{where}: {shortened(described)} does not describe an edit; restore the file from a copy")
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _views(payload[end:], layout, where).items():
        layer, _, side = name.rpartition(".")
        if side not in ("u", "v") or tensor.dim() != 2:
            raise ValueError(
                f"{where}: it holds {shortened(name)} of shape {tuple(tensor.shape)}, expected factors u and v"
            )
        sides.setdefault(layer, {})[side] = tensor
    updates: dict[str, Update] = {}
    for layer, pair in sides.items():
        if len(pair) != 2 or len(pair["u"]) != len(pair["v"]):
            raise ValueError(f"{where}: the factors of {shortened(layer)} are no pair; restore the file from a copy")
        updates[layer] = (pair["u"], pair["v"])
    return Edit.from_file(described, updates, where)


def _read_header(text: bytes, where: str) -> tuple[dict[str, str], _Layout]:
    """Read and check a header. Those of one editor's edits differ in their metadata alone, which come first."""
    if text.startswith(_METADATA) and len(text) < _LARGE:
        try:
            decoded = text.decode()
            described, end = _DECODER.raw_decode(decoded, len(_METADATA))
            if isinstance(described, str):
                return {"edit": described}, _known_layout(decoded[end:])
        except ValueError:
            pass  # the error is that of the whole header
    metadata, header = read_header(text, where)
    check_entries(header, where, dtypes=EDIT_DTYPES)
    return metadata, _layout(header, where)


@lru_cache(maxsize=1024)
def _known_layout(rest: str) -> _Layout:
    """Read and check a header of which only the metadata's value is missing."""
    header = read_header(_METADATA + b'""' + rest.encode(), "")[1]
    check_entries(header, "", dtypes=EDIT_DTYPES)
    return _layout(header, "")


def _layout(header: dict[str, Any], where: str) -> _Layout:
    """Return name, dtype, first byte, size in values and shape of each tensor, and the bytes that all take."""
    tensors, end = [], 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            dtype, count = EDIT_DTYPES[entry["dtype"]], math.prod(entry["shape"])
            if first != end or last - first != count * dtype.itemsize:
                raise ValueError(f"{name} does not begin where the tensor before it ends, or has not its size")
            tensors.append((name, dtype, first, count, entry["shape"]))
            end = last
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not a whole safetensors file ({error}); restore the file from a copy") from error
    return tensors, end


def _views(body: memoryview, layout: _Layout, where: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file as views of its body, which safetensors itself would copy."""
    entries, size = layout
    if size != len(body):
        raise ValueError(
            f"{where} is not a whole safetensors file (its tensors take {size} bytes of {len(body)}); restore the "
            "file from a copy"
        )
    tensors = {
        name: (
            torch.frombuffer(body, dtype=dtype, count=count, offset=first) if count else torch.empty(0, dtype=dtype)
        ).view(shape)
        for name, dtype, first, count, shape in entries
    }
    _check_finite(body, tensors, where)
    return tensors


def _check_finite(body: memoryview, tensors: dict[str, torch.Tensor], where: str) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    # All in one pass, without a copy; one by one to name the one.
    every = {"": torch.frombuffer(body, dtype=dtypes.pop())} if len(dtypes) == 1 and body else tensors
    if not all(map(_is_finite, every.values())):
        name = next(name for name, tensor in tensors.items() if not _is_finite(tensor))
        raise ValueError(f"{where}: {name} holds NaN or infinity; restore the file from a copy")


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():  # codes are finite, whatever they are
        return True
    return all(map(math.isfinite, map(float, tensor.aminmax())))


@contextmanager
def uncollected() -> Iterator[None]:
    """Make many objects that all stay without a search for those that do not, which takes longer with each of them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
