"""Contents of a folder: an editor, saved edits or a LoRA adapter, with checks of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from ..config import CONFIG_NAME, EditorConfig
from ..edits.edit import Edit
from ..edits.edits_file import read_edits_file
from ..edits.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from ..hub.cards import CARD_NAME
from ..hub.editor_files import FILES_BESIDE_CONFIG, MODEL_CONFIG_NAME, REPLACED_FILES, is_of_editor
from ..hub.files import EDITS_NAME, SCOPE_NAME, WEIGHTS_NAME, files_like, opened, read_json_file, read_weights
from ..hub.plots import CURVE_NAME, METRICS_NAME
from ..hub.transfer import check_download, check_is_no_file, download_error, find_files
from ..scope.files import check_scope


_SHOWN = [CARD_NAME, CURVE_NAME, METRICS_NAME]
_FILES = {
    "editor": [CONFIG_NAME, *FILES_BESIDE_CONFIG],
    "edits": [*files_like(EDITS_NAME), *_SHOWN],
    "LoRA adapter": [ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, *_SHOWN],
}
PATTERNS = sorted({pattern for patterns in _FILES.values() for pattern in patterns})


@dataclass
class Contents:
    """
    The contents of a folder.

    Args:
        kind (`str`): `"editor"`, `"edits"` or `"LoRA adapter"`.
        files (`list[str]`): Names of the files of that kind.
        size (`int`): Size of the weights in bytes.
        config ([`EditorConfig`], *optional*): The configuration of an editor.
        adapter (`dict[str, Any]`, *optional*): The configuration of an adapter.
        edits (`list[Edit]`): The saved edits.
        shapes (`dict[str, tuple[int, ...]]`): The shapes of an editor's tensors.
    """

    kind: str
    files: list[str]
    size: int
    config: EditorConfig | None = None
    adapter: dict[str, Any] | None = None
    edits: list[Edit] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def replaces(self) -> Sequence[str]:
        """Return patterns of the files that an upload replaces."""
        return {"editor": REPLACED_FILES, "edits": files_like(EDITS_NAME)}.get(self.kind, [])


def fetch(name: str, revision: str | None = None) -> Path:
    """
    Return a folder, downloaded from one commit and checked against the Hub's hashes if it is not local.

    Args:
        name (`str`): A folder, or a repository's id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: The name is neither a folder nor a repository.
        NotADirectoryError: It is a file's.
        OSError: The Hub refused the download or could not be reached.
        ValueError: A downloaded file is damaged.
    """
    check_is_no_file(Path(name))
    if Path(name).is_dir():
        return Path(name)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name} is neither a folder here nor the id of a repository on the Hub") from error
    except (OSError, HTTPError) as error:
        raise download_error(error, name, revision) from error
    for path in folder.iterdir():
        check_download(path)
    return folder


def read_contents(folder: str | Path, name: str | None = None) -> Contents:
    """
    Read and check the contents of a folder, without a model.

    Args:
        folder (`str` or `Path`): The folder.
        name (`str`, *optional*): The folder's name in messages.

    Raises:
        FileNotFoundError: The folder holds no editor, edits or adapter.
        NotADirectoryError: It is a file.
        ValueError: A file is damaged.
    """
    folder = Path(folder)
    check_is_no_file(folder)
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if CONFIG_NAME in present:
        kind, main = "editor", WEIGHTS_NAME
    elif any(fnmatch(file, pattern) for file in present for pattern in files_like(EDITS_NAME)):
        kind, main = "edits", EDITS_NAME
    elif ADAPTER_CONFIG_NAME in present:
        kind, main = "LoRA adapter", ADAPTER_WEIGHTS_NAME
    else:
        raise FileNotFoundError(
            f"{name or folder} holds no editor, no saved edits and no LoRA adapter; hf-mend train makes an editor, "
            "hf-mend edit --save FOLDER keeps edits"
        )
    files = sorted(file for file in present if any(fnmatch(file, pattern) for pattern in _FILES[kind]))
    if MODEL_CONFIG_NAME in files and not is_of_editor(folder / MODEL_CONFIG_NAME):
        files.remove(MODEL_CONFIG_NAME)  # a model's in the same folder
    size = sum((folder / file).stat().st_size for file in files if file.endswith(".safetensors"))
    contents = Contents(kind, files, size)
    weights = find_files(folder, [main])[main]
    if kind == "editor":
        contents.config = EditorConfig.from_json_file(folder / CONFIG_NAME)
        if contents.config.scope:
            check_scope(find_files(folder, [SCOPE_NAME])[SCOPE_NAME])
        contents.shapes = {key: tuple(value.shape) for key, value in read_weights(weights)[0].items()}
    elif kind == "edits":
        contents.edits = read_edits_file(weights)[0]
    else:
        contents.adapter = read_json_file(folder / ADAPTER_CONFIG_NAME)
        with opened(weights):
            pass  # opening checks the header
    return contents
