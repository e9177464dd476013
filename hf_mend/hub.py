"""Files of an editor or an edit collection, from a folder or from the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from .files import recover_folder


def find_files(
    name_or_path: str | Path, names: Sequence[str], subfolder: str | None = None, **hub_kwargs: Any
) -> dict[str, Path]:
    """
    Paths of files, downloaded if the name is not a folder.

    Args:
        name_or_path (`str` or `Path`): A folder, or a repository's id on the Hub.
        names (`Sequence[str]`): Names of the files.
        subfolder (`str`, *optional*): Where in the folder or repository they are.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and the like, as for `hf_hub_download`.

    Raises:
        FileNotFoundError: The folder or repository, or one of the files, does not exist.
    """
    folder = Path(name_or_path)
    recover_folder(folder)
    if folder.is_dir():
        paths = {name: folder / (subfolder or "") / name for name in names}
        for path in paths.values():
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} does not exist; {folder} is not what save_pretrained or save_edits writes"
                )
        return paths
    try:
        return {
            name: Path(hf_hub_download(str(name_or_path), name, subfolder=subfolder, **hub_kwargs)) for name in names
        }
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name_or_path!s} is neither a folder here nor the id of a repository on the Hub"
        ) from error
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"{name_or_path!s} on the Hub has no {', '.join(names)}: {error}") from error
