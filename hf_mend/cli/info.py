"""`hf-mend info`: what an editor, a collection of edits or an adapter is, without loading a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import AsJson, Report, Revision, plural


if TYPE_CHECKING:
    from .contents import Contents


def info(
    name: Annotated[str, typer.Argument(help="An editor, saved edits or a LoRA adapter: a folder or a Hub id.")],
    revision: Revision = None,
    as_json: AsJson = False,
) -> Report:
    """
    Shows what an editor, saved edits or a LoRA adapter is, after checking the files. No model is loaded.

    \b
    Example:
      hf-mend info my-editor
      hf-mend info my-edits --json
    """
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
        "layers": layers,
        "parameters": parameters,
        "config": config.to_dict(),
    }
    lines = [
        f"  method: {config.method}, {parameters:,} parameters",
        f"  base model: {config.base_model_name_or_path or 'not named'} ({fingerprint.get('architecture')}, "
        f"{config.task_type})",
        f"  edits {plural(len(layers), 'layer')}:",
        *(f"    {layer}  {' x '.join(map(str, shape))}" for layer, shape in layers.items()),
    ]
    return document, lines


def _edits(contents: Contents) -> tuple[dict[str, object], list[str]]:
    edits = [{**edit.describe(), "rank": edit.rank, "layers": sorted(edit.updates)} for edit in contents.edits]
    return {"edits": edits}, [f"  {edit.id}  {edit.prompt!r} -> {edit.target!r}" for edit in contents.edits]


def _adapter(contents: Contents) -> tuple[dict[str, object], list[str]]:
    adapter = contents.adapter or {}
    base, rank, layers = (adapter.get(name) for name in ("base_model_name_or_path", "r", "target_modules"))
    lines = [f"  base model: {base or 'not named'}", f"  rank {rank} in {layers}"]
    return {"base_model": base, "rank": rank, "layers": layers}, lines
