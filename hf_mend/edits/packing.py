"""An edit as a record of a store: its tensors as safetensors, and its description in their header."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    return Edit.from_file(described, _views(payload[end:], layout, where), where)


@dataclass(frozen=True)
class _Run:
    """Tensors of one dtype that lie one behind the other, from a byte on."""

    dtype: torch.dtype
    start: int
    names: list[str]
    counts: list[int]  # of values
    shapes: list[list[int]]


@dataclass(frozen=True)
class _Layout:
    """Where an edit's tensors lie, the layers' names with the numbers of `u` and `v`, and the bytes that all take."""

    runs: list[_Run]
    pairs: list[tuple[str, int, int]]
    size: int


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
    runs: list[_Run] = []
    shapes: dict[str, list[int]] = {}
    end = 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            dtype, shapes[name] = EDIT_DTYPES[entry["dtype"]], entry["shape"]
            count = math.prod(entry["shape"])
            if first != end or last - first != count * dtype.itemsize:
                raise ValueError(f"{name} does not begin where the tensor before it ends, or has not its size")
            if not runs or runs[-1].dtype != dtype:
                runs.append(_Run(dtype, first, [], [], []))
            runs[-1].names.append(name)
            runs[-1].counts.append(count)
            runs[-1].shapes.append(entry["shape"])
            end = last
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not a whole safetensors file ({error}); restore the file from a copy") from error
    return _Layout(runs, _pairs(shapes, where), end)


def _pairs(shapes: dict[str, list[int]], where: str) -> list[tuple[str, int, int]]:
    """Return the layers, with the numbers of their factors among the tensors."""
    sides: dict[str, dict[str, int]] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        layer, _, side = name.rpartition(".")
        if side not in ("u", "v") or len(shape) != 2:
            raise ValueError(f"{where}: it holds {shortened(name)} of shape {tuple(shape)}, expected factors u and v")
        sides.setdefault(layer, {})[side] = number
    rows = [shape[0] for shape in shapes.values()]
    for layer, pair in sides.items():
        if len(pair) != 2 or rows[pair["u"]] != rows[pair["v"]]:
            raise ValueError(f"{where}: the factors of {shortened(layer)} are no pair; restore the file from a copy")
    return [(layer, pair["u"], pair["v"]) for layer, pair in sides.items()]


def _views(body: memoryview, layout: _Layout, where: str) -> dict[str, Update]:
    """Return the factors of each layer as views of a safetensors file's body, which safetensors itself would copy."""
    if layout.size != len(body):
        raise ValueError(
            f"{where} is not a whole safetensors file (its tensors take {layout.size} bytes of {len(body)}); restore "
            "the file from a copy"
        )
    tensors: list[torch.Tensor] = []
    for run in layout.runs:
        count = sum(run.counts)
        whole = (
            torch.frombuffer(body, dtype=run.dtype, count=count, offset=run.start)
            if count
            else torch.empty(0, dtype=run.dtype)
        )
        flat = torch.split_with_sizes(whole, run.counts)
        parts = [part.view(shape) for part, shape in zip(flat, run.shapes, strict=True)]
        if not _is_finite(whole):
            name = next(name for name, part in zip(run.names, parts, strict=True) if not _is_finite(part))
            raise ValueError(f"{where}: {name} holds NaN or infinity; restore the file from a copy")
        tensors += parts
    return {layer: (tensors[u], tensors[v]) for layer, u, v in layout.pairs}


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
