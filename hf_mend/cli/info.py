"""`hf-mend info`: describe an editor, saved edits, an adapter or a method without loading a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..data.display import shown
from ..hub.text import on_one_line
from .common import AsJson, Report, Revision, plural


if TYPE_CHECKING:
    from .contents import Contents


def info(
    name: Annotated[
        str, typer.Argument(help="An editor, saved edits or a LoRA adapter: a folder or a Hub id. Or a method's name.")
    ],
    revision: Revision = None,
    as_json: AsJson = False,
) -> Report:
    """
    Describe an editor, saved edits or a LoRA adapter after checking its files, or list the options of a method. No
    model is loaded.

    \b
    Example:
      hf-mend info my-editor
      hf-mend info my-edits --json
      hf-mend info memit
    """
    from pathlib import Path

    from ..methods.base import registered_methods

    if name in registered_methods() and not Path(name).is_dir():
        return _method(name)
    from .contents import fetch, read_contents

    contents = read_contents(fetch(name, revision), name)
    document, lines = {"editor": _editor, "edits": _edits}.get(contents.kind, _adapter)(contents)
    size = f"{contents.size / 1e6:.1f} MB" if contents.size >= 1e6 else f"{contents.size / 1e3:.0f} kB"
    head = {"name": name, "kind": contents.kind, "bytes": contents.size, "files": contents.files}
    return Report({**head, **document}, "\n".join([f"{name}: {contents.kind}, {size}", *lines]))


def _editor(contents: Contents) -> tuple[dict[str, object], list[str]]:
    from math import prod

    config = contents.config
    assert config is not None
    fingerprint = config.base_fingerprint or {}
    layers = {str(layer): list(shape) for layer, shape in (fingerprint.get("layers") or {}).items()}
    parameters = sum(prod(shape) for shape in contents.shapes.values())
    document = {
        "method": config.method,
        "base_model": config.base_model_name_or_path,
        "base_architecture": fingerprint.get("architecture"),
        "task_type": config.task_type,
        "scope": config.scope,
        "layers": layers,
        "parameters": parameters,
        "config": config.to_dict(),
    }
    lines = [
        f"  method: {config.method}, {parameters:,} parameters",
        f"  base model: {on_one_line(config.base_model_name_or_path or 'not named')} "
        f"({on_one_line(fingerprint.get('architecture'))}, "
        f"{config.task_type})",
        f"  scope: {'edits act where a text asks for them' if config.scope else 'none, edits act everywhere'}",
        f"  edits {plural(len(layers), 'layer')}:",
        *(f"    {on_one_line(layer)}  {' x '.join(map(str, shape))}" for layer, shape in layers.items()),
    ]
    return document, lines


def _method(name: str) -> Report:
    from dataclasses import fields

    from ..config import EditorConfig
    from ..methods import get_method

    method = get_method(name)
    common = {item.name for item in fields(EditorConfig)}
    own = [item for item in fields(method.config_class) if item.name not in common]
    options = {item.name: {"default": item.default, "help": item.metadata.get("help", "")} for item in own}
    trained = "needs a trained editor" if method.trains else "needs no training"
    lines = [f"  {key}={value['default']}  {value['help']}" for key, value in options.items()]
    document = {"name": name, "kind": "method", "trains": method.trains, "options": options}
    return Report(document, "\n".join([f"{name}: method, {trained}; its options and their defaults:", *lines]))


def _edits(contents: Contents) -> tuple[dict[str, object], list[str]]:
    edits = [{**edit.describe(), "rank": edit.rank, "layers": sorted(edit.updates)} for edit in contents.edits]
    lines = [f"  {on_one_line(edit.id)}  {shown(edit.prompt)} -> {shown(edit.target)}" for edit in contents.edits]
    return {"edits": edits}, lines


def _adapter(contents: Contents) -> tuple[dict[str, object], list[str]]:
    adapter = contents.adapter or {}
    base, rank, layers = (adapter.get(name) for name in ("base_model_name_or_path", "r", "target_modules"))
    base_line = f"  base model: {on_one_line(base or 'not named')}"
    lines = [base_line, f"  rank {on_one_line(rank)} in {on_one_line(layers)}"]
    return {"base_model": base, "rank": rank, "layers": layers}, lines
