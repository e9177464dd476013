"""`hf-mend info`: what an editor or a collection of edits is, without loading a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .common import AsJson, Report, Revision, plural


def info(
    name: Annotated[str, typer.Argument(help="An editor, or saved edits: a folder or a Hub id.")],
    revision: Revision = None,
    as_json: AsJson = False,
) -> Report:
    """
    Shows what an editor or a collection of edits is, after checking its files. No model is loaded.

    \b
    Example:
      hf-mend info my-editor
      hf-mend info my-edits --json
    """
    from ..config import CONFIG_NAME
    from ..files import EDITS_NAME, WEIGHTS_NAME
    from ..hub import find_files

    try:
        files = find_files(name, [CONFIG_NAME, WEIGHTS_NAME], revision=revision)
    except FileNotFoundError as error:
        try:
            files = find_files(name, [EDITS_NAME], revision=revision)
        except FileNotFoundError:
            raise error from None
        return _edits(name, files[EDITS_NAME])
    return _editor(name, files[CONFIG_NAME], files[WEIGHTS_NAME])


def _editor(name: str, config_path: Any, weights_path: Any) -> Report:
    from ..config import EditorConfig
    from ..files import read_tensors

    config = EditorConfig.from_json_file(config_path)
    tensors, _ = read_tensors(weights_path)
    fingerprint = config.base_fingerprint or {}
    document = {
        "kind": "editor",
        "name": name,
        "method": config.method,
        "base_model": config.base_model_name_or_path,
        "base_architecture": fingerprint.get("architecture"),
        "task_type": config.task_type,
        "layers": fingerprint.get("layers", {}),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": weights_path.stat().st_size,
        "config": config.to_dict(),
    }
    layers = [f"    {layer}  {rows} x {columns}" for layer, (rows, columns) in document["layers"].items()]
    text = "\n".join(
        [
            f"{name}: an editor ({config.method}) for {config.base_model_name_or_path or 'an unnamed model'}",
            f"  architecture: {document['base_architecture']}, {config.task_type}",
            f"  size: {document['parameters']:,} parameters, {document['bytes'] / 1e6:.1f} MB",
            f"  edits {plural(len(layers), 'layer')}:",
            *layers,
        ]
    )
    return Report(document, text)


def _edits(name: str, path: Any) -> Report:
    from ..edits import edits_from_tensors
    from ..files import read_tensors

    tensors, metadata = read_tensors(path)
    edits = edits_from_tensors(tensors, metadata, path)
    document = {
        "kind": "edits",
        "name": name,
        "bytes": path.stat().st_size,
        "edits": [{**edit.describe(), "rank": edit.rank, "layers": sorted(edit.updates)} for edit in edits],
    }
    lines = [f"{name}: {plural(len(edits), 'edit')}, {document['bytes'] / 1e3:.0f} kB"]
    lines += [f"  {edit.id}  {edit.prompt!r} -> {edit.target!r}" for edit in edits]
    return Report(document, "\n".join(lines))
