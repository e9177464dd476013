"""Reading and writing of the safetensors and JSON files of editors and edits; files are validated before use."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .atomic import replaced_file


WEIGHTS_NAME = "editor.safetensors"
SCOPE_NAME = "scope.safetensors"
EDITS_NAME = "edits.safetensors"
STORE_MAGIC = b"hf_mend\n"  # the first bytes of a store of edits

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors")
# The dtypes that these files may hold, by their names in a safetensors header.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Those of files of edits, which may hold codes.
EDIT_DTYPES = {**DTYPES, "U8": torch.uint8}
# A header of this size describes some hundred thousand tensors, and parsing it takes well below a gigabyte.
_MAX_HEADER = 32 << 20
_MAX_NAME = 512
_DEEPEST = 32


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    with replaced_file(path) as work:
        save_file(_plain(tensors), work, metadata={"format": "pt", **metadata})


def write_weights(
    folder: str | Path, name: str, tensors: Mapping[str, torch.Tensor], max_shard_size: int | str = "5GB"
) -> None:
    """
    Write tensors as one safetensors file, or, past a size, as several with an index. The files that an earlier call
    wrote under that name are deleted.

    Args:
        folder (`str` or `Path`): The folder; [`~hf_mend.hub.atomic.replaced_folder`] gives one for all or nothing.
        name (`str`): The file's name, `editor.safetensors`; shards are `editor-00001-of-00002.safetensors`.
        tensors (`Mapping[str, torch.Tensor]`): The tensors.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): The largest size of a file, in bytes or with a unit.
    """
    pattern = name.replace(".safetensors", "{suffix}.safetensors")
    save_torch_state_dict(_plain(tensors), folder, filename_pattern=pattern, max_shard_size=max_shard_size)
    if not tensors:  # for which save_torch_state_dict writes no file
        write_tensors(Path(folder) / name, {}, {})


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous copies on the CPU; safetensors would refuse or leave out tensors that share memory."""
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}


def read_weights(
    path: str | Path, expected: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Read the files that [`write_weights`] wrote.

    Args:
        path (`str` or `Path`): The safetensors file, or the index of several.
        expected (`Mapping[str, tuple[int, ...]]`, *optional*): Name -> shape of every tensor that must be there.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is truncated or altered, or does not hold the expected tensors.
    """
    path = Path(path)
    if path.suffix != ".json":
        return read_tensors(path, expected)
    shards = read_index(path)
    listed = {name for names in shards.values() for name in names}
    if expected is not None:
        _check_names(path, listed, set(expected))
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for shard, names in shards.items():
        wanted = None if expected is None else {name: expected[name] for name in names}
        more, metadata = read_tensors(path.parent / shard, wanted)
        _check_names(path.parent / shard, set(more), set(names))
        tensors.update(more)
    return tensors, metadata


def read_index(path: str | Path) -> dict[str, list[str]]:
    """
    Read an index and return the names of the tensors in each shard.

    Raises:
        ValueError: The index is damaged, or names files other than its own shards.
    """
    path = Path(path)
    weight_map = read_json_file(path).get("weight_map")
    stem = path.name.removesuffix(".safetensors.index.json")
    shards: dict[str, list[str]] = {}
    for name, file_name in weight_map.items() if isinstance(weight_map, dict) else ():
        # Shards have fixed names, so no path in an index leads anywhere else.
        if not isinstance(file_name, str) or not _SHARD.fullmatch(file_name.removeprefix(stem)):
            raise ValueError(
                f"{path} names the file {shortened(file_name)}, expected one like {stem}-00001-of-00002.safetensors; "
                "it was altered, download or save it again"
            )
        shards.setdefault(file_name, []).append(name)
    if not shards:
        raise ValueError(f"{path} has no weight_map, expected tensor names and their files; download or save it again")
    return shards


def index_name(name: str) -> str:
    """Return the name of the index of a sharded file."""
    return f"{name}.index.json"


def files_like(name: str) -> list[str]:
    """Return patterns for all files that [`write_weights`] may write under a name."""
    return [name, name.replace(".safetensors", "-*-of-*.safetensors"), index_name(name)]


def read_tensors(
    path: str | Path,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Check names, shapes and dtypes in a safetensors file's header, read its tensors, and check that they are finite.

    Args:
        path (`str` or `Path`): The file.
        expected (`Mapping[str, tuple[int, ...]]`, *optional*): Name -> shape of every tensor that must be there.
        dtypes (`Mapping[str, torch.dtype]`): The dtypes that it may hold, by their names in its header.

    Returns:
        `tuple`: The tensors in their stored dtype, and the header's metadata.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is truncated or altered, or does not hold the expected tensors.
    """
    with opened(path, expected, dtypes) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():  # in float32, in which it will be used
            raise ValueError(f"{path}: {name} holds NaN or infinity; the file is damaged or its training diverged")
    return tensors, metadata


@contextmanager
def opened(
    path: str | Path,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
) -> Iterator[Any]:
    """
    Open a safetensors file, as `safe_open` does, after checking its header, so that no memory is allocated for a wrong
    one. Arguments and errors are those of [`read_tensors`].

    safetensors itself refuses offsets that overlap, leave gaps or do not fit shape and dtype, and a file that is
    longer or shorter than its header says; [`check_entries`] refuses the other faults.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the folder of a saved editor or of saved edits?")
    with open(path, "rb") as binary:
        header = read_header(binary.read(header_size(binary.read(8), path.stat().st_size, path)), path)[1]
    check_entries(header, path, expected, dtypes)
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, OverflowError) as error:
        fault = shortened(str(error))  # which may quote the header
        raise ValueError(f"{path} is not a whole safetensors file ({fault}); download or save it again") from error


def header_size(start: bytes, size: int, source: str | Path) -> int:
    """
    Return the size of a safetensors file's header, which its first 8 bytes state.

    Raises:
        ValueError: The file, of `size` bytes, does not hold such a header.
    """
    header = int.from_bytes(start, "little")
    if len(start) < 8 or header > min(_MAX_HEADER, size - 8):
        raise ValueError(
            f"{source} is not a whole safetensors file (a header of {header} bytes); download or save it again"
        )
    return header


def read_header(text: bytes, source: str | Path) -> tuple[dict[str, str], dict[str, Any]]:
    """
    Return the metadata and the tensors' entries of a safetensors header.

    Raises:
        ValueError: The header is not JSON, has a name twice (of which safetensors takes the last), or its metadata are
            not strings.
    """
    header = read_json_object(decoded(text, f"the header of {source}"), f"the header of {source}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(
            f"{source} is not a whole safetensors file (its metadata are not strings); download or save it again"
        )
    return metadata, header


def check_entries(
    header: Mapping[str, Any],
    source: str | Path,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
) -> None:
    """
    Check names, dtypes and shapes of a safetensors header's tensors, and compare names and shapes with the expected.

    Raises:
        ValueError: A name, dtype or shape is not valid in these files, or not the expected one.
    """
    if expected is not None:
        _check_names(source, set(header), set(expected))
    for name, entry in header.items():
        if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise ValueError(
                f"{source} has a tensor named {shortened(name)}; the file was altered, download or save it again"
            )
        dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        sizes = shape if isinstance(shape, list) and len(shape) <= 8 else [None]
        if not all(type(size) is int and 0 <= size < 2**48 for size in sizes):  # PyTorch's own limit is not far off
            raise ValueError(
                f"{source}: {name} has the header {shortened(entry)}; the file was altered, download it again"
            )
        if not isinstance(dtype, str) or dtype not in dtypes:
            raise ValueError(f"{source}: {name} has dtype {shortened(dtype)}, expected a floating-point one")
        if expected is not None and tuple(sizes) != tuple(expected[name]):
            raise ValueError(
                f"{source}: {name} has shape {tuple(sizes)}, its configuration says {tuple(expected[name])}; the file "
                "or the configuration was altered, or they belong to different editors"
            )


def _check_names(path: str | Path, names: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - names), sorted(names - expected)
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its configuration: missing tensors {missing[:5]}, unexpected "
            f"{shortened(extra[:5])}. Was the configuration altered by hand, or is the file another editor's?"
        )


def read_json_file(path: str | Path) -> dict[str, Any]:
    """
    Read a JSON object from a file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a JSON object, or far too large for one of this library's.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > _MAX_HEADER:
        raise ValueError(f"{path} has {size} bytes, too many for a file of settings; download or save it again")
    return read_json_object(decoded(path.read_bytes(), path), path)


def decoded(data: bytes, source: str | Path) -> str:
    """
    Decode a text.

    Raises:
        ValueError: It is not UTF-8; the message names the source.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not valid JSON ({error}); download or save it again") from error


def read_json_object(text: str, source: str | Path) -> dict[str, Any]:
    """
    Parse JSON text that must be an object.

    Raises:
        ValueError: The text is not a JSON object; the message names the source.
    """
    values = read_json(text, source)
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds a {type(values).__name__}, expected a JSON object; save it again")
    return values


def read_json(text: str, source: str | Path) -> Any:
    """
    Parse JSON text strictly: no name twice in an object, no NaN, and limited nesting.

    Raises:
        ValueError: The text breaks one of these rules; the message names the source.
    """
    try:
        values = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:  # a number with thousands of digits is a ValueError too
        raise ValueError(f"{source} is not valid JSON ({error}); download or save it again") from error
    if "\\ud" in text.lower() and _has_lone_surrogate(values):
        raise ValueError(f"{source} holds half of a character, a lone surrogate; download or save it again")
    # Few texts have so many brackets that a look is needed.
    if text.count("{") + text.count("[") > _DEEPEST and _is_deeper(values, _DEEPEST):
        raise ValueError(f"{source} is nested more than {_DEEPEST} levels deep; download or save it again")
    return values


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in inner if isinstance(item, (dict, list)))


def _has_lone_surrogate(values: Any) -> bool:
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return values


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refused)


def shortened(value: Any, length: int = 200) -> str:
    """Return `repr(value)` for a message, cut at `length`."""
    text = reprlib.repr(value) if isinstance(value, (int, list, tuple, dict)) else repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
