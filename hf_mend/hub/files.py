"""Reading and writing an editor's and an edit collection's files: atomically, and validated before use."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


WEIGHTS_NAME = "editor.safetensors"
EDITS_NAME = "edits.safetensors"

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors")
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# A header of this size describes some hundred thousand tensors, and parsing it takes well below a gigabyte.
_MAX_HEADER = 32 << 20
_MAX_NAME = 512
_DEEPEST = 32


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """
    Yields a copy of a folder that takes the folder's place when the context ends well.

    A process killed at any point leaves the earlier folder whole: under its own name, or, in the instant between the
    two renames, under the name from which [`recover_folder`] brings it back. Files that the context does not write are
    kept. A folder that cannot be renamed (a mounted volume, the working directory) keeps its place, and its files are
    replaced one by one.

    Args:
        path (`str` or `Path`): The folder to replace; it need not exist.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    fixed = path.is_dir() and _is_fixed(path)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path if fixed else path.parent))
    try:
        if path.is_dir():
            _copy_into(work, path, with_folders=not fixed)
        earlier = {entry.name for entry in work.iterdir()}
        os.chmod(work, 0o755)
        yield work
        for file in work.iterdir():
            if file.is_file():
                _flush(file)
        if fixed:
            _move_files(work, path, earlier)
            return
        previous = _previous(path)
        if path.is_dir():
            os.rename(path, previous)
        os.rename(work, path)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_fixed(path: Path) -> bool:
    """Whether a folder cannot be renamed, or should not be."""
    here = Path.cwd()
    return os.path.ismount(path) or path == here or path in here.parents or not os.access(path.parent, os.W_OK)


def _copy_into(work: Path, folder: Path, with_folders: bool) -> None:
    """
    Copies a folder's own files. Those further down may be large, or open, and are not written to here: links them.

    A link among the files becomes the file that it leads to, so that nothing is written through it to another place.
    """
    for entry in folder.iterdir():
        if entry.is_file():
            shutil.copy2(entry, work / entry.name)
        elif with_folders and entry.is_dir() and entry != work:
            if entry.is_symlink():
                os.symlink(os.readlink(entry), work / entry.name)
            else:
                shutil.copytree(entry, work / entry.name, symlinks=True, copy_function=link_or_copy)


def _move_files(work: Path, path: Path, earlier: set[str]) -> None:
    """Brings a folder's files to another, and takes away those that are in it no more."""
    files = sorted(work.iterdir(), key=lambda file: (file.suffix == ".json", file.name))  # a configuration last
    for file in files:
        os.replace(file, path / file.name)
    for name in earlier - {file.name for file in files}:
        (path / name).unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name of a file, where the file system has such; a copy elsewhere."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def recover_folder(path: str | Path) -> None:
    """Brings back a folder that a killed process had moved aside and not yet replaced."""
    path = Path(path).resolve()
    previous = _previous(path)
    if previous.is_dir():
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            os.rename(previous, path)


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yields a new file that takes a file's place when the context ends well, whole or not at all."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        _flush(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whole or not at all."""
    plain = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    with replaced_file(path) as work:
        save_file(plain, work, metadata={"format": "pt", **metadata})


def write_weights(
    folder: str | Path,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    max_shard_size: int | str = "5GB",
) -> None:
    """
    Writes tensors as one safetensors file, or, past a size, as several with an index. What an earlier call wrote under
    that name goes.

    Args:
        folder (`str` or `Path`): Where; one that [`replaced_folder`] gave, for all or nothing.
        name (`str`): The file's name, `editor.safetensors`; shards are `editor-00001-of-00002.safetensors`.
        tensors (`Mapping[str, torch.Tensor]`): What to write.
        metadata (`Mapping[str, str]`): For each file's header.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): The largest size of a file, in bytes or with a unit.
    """
    folder = Path(folder)
    pattern = name.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size)
    for earlier in files_like(name):
        for path in folder.glob(earlier):
            path.unlink()
    for file_name, names in (split.filename_to_tensors or {name: []}).items():  # of no tensors, an empty file
        write_tensors(folder / file_name, {key: tensors[key] for key in names}, metadata)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / index_name(name)).write_text(text, encoding="utf-8")


def read_weights(
    path: str | Path, expected: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Reads what [`write_weights`] wrote.

    Args:
        path (`str` or `Path`): The safetensors file, or the index of several.
        expected (`Mapping[str, tuple[int, ...]]`, *optional*): Name -> shape of every tensor that must be there.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is truncated, altered, or does not hold what is expected.
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
    Which tensors each shard holds, of an index beside the shards.

    Raises:
        ValueError: It is damaged, or names files other than its own shards.
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
    """The name of the index of a sharded file."""
    return f"{name}.index.json"


def files_like(name: str) -> list[str]:
    """Patterns for whatever [`write_weights`] may write under a name."""
    return [name, name.replace(".safetensors", "-*-of-*.safetensors"), index_name(name)]


def read_tensors(
    path: str | Path, expected: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Reads a safetensors file after checking its header against the file's size, and names, shapes and dtypes against
    what is expected; then checks the values.

    Args:
        path (`str` or `Path`): The file.
        expected (`Mapping[str, tuple[int, ...]]`, *optional*): Name -> shape of every tensor that must be there.

    Returns:
        `tuple`: The tensors in their stored dtype, and the header's metadata.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, altered, or does not hold what is expected.
    """
    path = Path(path)
    metadata = check_header(path, expected)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download or save it again") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():  # in float32, in which it will be used
            raise ValueError(f"{path}: {name} holds NaN or infinity; the file is damaged or its training diverged")
    return tensors, metadata


def check_header(path: str | Path, expected: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, str]:
    """
    Checks a safetensors file by its header alone: nothing that the file claims is taken in memory before.

    Arguments and errors are those of [`read_tensors`].

    Returns:
        `dict[str, str]`: The header's metadata.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the folder of a saved editor or of saved edits?")
    with open(path, "rb") as file:
        size = path.stat().st_size
        text = file.read(header_size(file.read(8), size, path))
    return read_header(text, size - 8 - len(text), path, expected)[0]


def header_size(start: bytes, size: int, source: str | Path) -> int:
    """
    The size of a safetensors file's header, after the file's first 8 bytes.

    Raises:
        ValueError: The file, of `size` bytes, does not hold it.
    """
    header = int.from_bytes(start, "little")
    if len(start) < 8 or header > min(_MAX_HEADER, size - 8):
        raise ValueError(
            f"{source} is not a whole safetensors file (a header of {header} bytes); download or save it again"
        )
    return header


def read_header(
    text: bytes, body: int, source: str | Path, expected: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]]:
    """
    Checks a safetensors header against the `body` bytes that follow it.

    Returns:
        `tuple`: The metadata, and for each tensor its dtype, shape and place in the body, the first byte and the end.

    Raises:
        ValueError: They do not fit, or are not what is expected (see [`read_tensors`]).
    """
    path, broken = source, f"{source} is not a whole safetensors file"
    header = read_json_object(text.decode("utf-8", "replace"), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{broken} (its metadata are not strings); download or save it again")
    if expected is not None:
        _check_names(path, set(header), set(expected))
    places = {}
    for name, entry in header.items():
        dtype, shape, span = _check_entry(path, name, entry)
        if expected is not None and shape != tuple(expected[name]):
            raise ValueError(
                f"{path}: {name} has shape {shape}, its configuration says {tuple(expected[name])}; the file or the "
                "configuration was altered, or they belong to different editors"
            )
        places[name] = (dtype, shape, span)
    end = 0
    for first, last in sorted(span for _, _, span in places.values()):
        if first != end:
            raise ValueError(f"{broken} (its tensors overlap or leave gaps); download or save it again")
        end = last
    if end != body:
        raise ValueError(f"{broken} (its tensors take {end} bytes, it has {body}); download or save it again")
    return metadata, places


def _check_entry(path: str | Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and place of one tensor of a header."""
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise ValueError(
            f"{path} has a tensor named {shortened(name)}; the file was altered, download or save it again"
        )
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    shape: Any
    span: Any
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _is_counts(shape) or not _is_counts(span) or len(span) != 2 or len(shape) > 8:
        raise ValueError(f"{path}: {name} has the header {shortened(entry)}; the file was altered, download it again")
    if not isinstance(dtype, str) or dtype not in _FLOATS:
        raise ValueError(f"{path}: {name} has dtype {shortened(dtype)}, expected a floating-point one")
    if span[1] - span[0] != math.prod(shape) * _FLOATS[dtype]:
        raise ValueError(
            f"{path}: {name} claims the shape {shortened(tuple(shape))} of {dtype} in {span[1] - span[0]} bytes; the "
            "file was altered, download or save it again"
        )
    return dtype, tuple(shape), (span[0], span[1])


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _check_names(path: str | Path, names: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - names), sorted(names - expected)
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its configuration: missing tensors {missing[:5]}, unexpected "
            f"{shortened(extra[:5])}. Was the configuration altered by hand, or is the file another editor's?"
        )


def read_json_file(path: str | Path) -> dict[str, Any]:
    """
    Reads a JSON object from a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a JSON object, or far too large for one of this library's.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > _MAX_HEADER:
        raise ValueError(f"{path} has {size} bytes, too many for a file of settings; download or save it again")
    return read_json_object(path.read_bytes().decode("utf-8", "replace"), path)


def read_json_object(text: str, source: str | Path) -> dict[str, Any]:
    """
    Parses JSON text that must be an object.

    Raises:
        ValueError: It is not; the message names the source.
    """
    values = read_json(text, source)
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds a {type(values).__name__}, expected a JSON object; save it again")
    return values


def read_json(text: str, source: str | Path) -> Any:
    """
    Parses JSON text as the standard has it: no name twice in an object, no NaN; and not nested without end.

    Raises:
        ValueError: It is not such; the message names the source.
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_refused)
    except (ValueError, RecursionError) as error:  # the first also of a number with thousands of digits
        raise ValueError(f"{source} is not valid JSON ({error}); download or save it again") from error
    if _is_deeper(values, _DEEPEST):
        raise ValueError(f"{source} is nested more than {_DEEPEST} levels deep; download or save it again")
    return values


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in inner if isinstance(item, (dict, list)))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return values


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def shortened(value: Any, length: int = 200) -> str:
    """`repr(value)` for a message, cut where it is long."""
    text = reprlib.repr(value) if isinstance(value, (int, list, tuple, dict)) else repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _previous(path: Path) -> Path:
    return path.parent / f".{path.name}.previous"


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
