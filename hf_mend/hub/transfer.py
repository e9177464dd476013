"""Files of an editor or an edit collection, from a folder or from the Hub, and to the Hub."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .atomic import recover_folder
from .cards import with_sections_of
from .files import index_name, read_index, shortened


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
_LOG_IN = "log in with `hf auth login`, or pass token=... or set HF_TOKEN"


def find_files(
    name_or_path: str | Path,
    names: Sequence[str],
    subfolder: str | None = None,
    revision: str | None = None,
    **hub_kwargs: Any,
) -> dict[str, Path]:
    """
    Paths of files, downloaded if the name is not a folder; all are of one commit.

    Args:
        name_or_path (`str` or `Path`): A folder, or a repository's id on the Hub.
        names (`Sequence[str]`): Names of the files. Of one that is sharded the index is found, with the shards beside
            it.
        subfolder (`str`, *optional*): Where in the folder or repository they are.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download` and the like, as for `hf_hub_download`.

    Raises:
        FileNotFoundError: The folder or repository, or one of the files, does not exist or cannot be reached.
        PermissionError: The repository is there and may not be read.
        ValueError: An index or a downloaded file is damaged.
        OSError: A download broke off.
    """
    folder = Path(name_or_path)
    recover_folder(folder)
    if folder.is_dir():
        return {name: _in_folder(folder / (subfolder or ""), name) for name in names}
    source = _Repository(str(name_or_path), subfolder, revision, hub_kwargs)
    return {name: source.find(name) for name in names}


def _in_folder(folder: Path, name: str) -> Path:
    index = folder / index_name(name)
    if (folder / name).is_file() or not index.is_file():
        shards = [folder / name]
        found = shards[0]
    else:
        shards = [folder / shard for shard in read_index(index)]
        found = index
    for path in shards:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; {folder} is not what save_pretrained or save_edits writes"
            )
    return found


class _Repository:
    """Files of one commit of a repository on the Hub."""

    def __init__(self, name: str, subfolder: str | None, revision: str | None, hub_kwargs: dict[str, Any]):
        self.name = name
        self.subfolder = subfolder
        self.revision = revision
        self.hub_kwargs = hub_kwargs

    def find(self, name: str) -> Path:
        try:
            try:
                return self._download(name)
            except EntryNotFoundError:
                if not name.endswith(".safetensors"):
                    raise
                try:
                    index = self._download(index_name(name))
                except EntryNotFoundError:
                    index = None
                if index is None:
                    raise
                for shard in read_index(index):
                    self._download(shard)
                return index
        except HFValidationError as error:
            raise FileNotFoundError(
                f"{self.name} is neither a folder here nor the id of a repository on the Hub"
            ) from error
        except (OSError, HTTPError, EntryNotFoundError) as error:
            raise self._explained(name, error) from error

    def _download(self, name: str) -> Path:
        path = Path(
            hf_hub_download(self.name, name, subfolder=self.subfolder, revision=self.revision, **self.hub_kwargs)
        )
        # A commit that somebody makes between two downloads must not give one file of each.
        self.revision = commit_of(path) or self.revision
        check_download(path)
        return path

    def _explained(self, name: str, error: Exception) -> OSError:
        where = f"{self.name} on the Hub"
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if isinstance(cause, GatedRepoError) or status == 403:
            return PermissionError(
                f"{where} may not be read with this token: ask for access there, then {_LOG_IN}: {cause}"
            )
        if isinstance(cause, RepositoryNotFoundError) or status == 401:
            return FileNotFoundError(f"{where} does not exist, or is private: check the name, and {_LOG_IN}: {cause}")
        if isinstance(cause, RevisionNotFoundError):
            return FileNotFoundError(
                f"{where} has no revision {self.revision!r}; leave revision out for main: {cause}"
            )
        if isinstance(error, LocalEntryNotFoundError):
            return FileNotFoundError(
                f"{name} of {where} is not in the cache and could not be fetched ({_brief(cause)}); try again with a "
                "connection, without local_files_only and HF_HUB_OFFLINE"
            )
        if isinstance(error, EntryNotFoundError):
            return FileNotFoundError(
                f"{where} has no {name}; it is not what save_pretrained or save_edits writes: {error}"
            )
        return OSError(f"{name} of {where} could not be downloaded ({_brief(error)}); nothing was loaded, try again")


def commit_of(path: Path) -> str | None:
    """The commit that a file in the cache belongs to; `None` for a file elsewhere."""
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", str(path))
    return found[1] if found else None


def check_is_repository(name: str, what: str) -> None:
    """
    Checks that a name which came from the Hub names something on the Hub.

    Raises:
        ValueError: It is a path on this machine.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{what} is {shortened(name)}, expected the id of a repository on the Hub; a file from the Hub may not "
            "choose a path on this machine, so pass base_model_name_or_path if that is what you want"
        ) from error


def check_download(path: Path) -> None:
    """
    Compares a downloaded file with the hash that the Hub gave for it, which is its name in the cache.

    Raises:
        ValueError: They differ: the file was damaged on its way or in the cache. It is deleted.
    """
    if not path.is_symlink():
        return  # no links on this file system, so the file has no other name
    # One step only: with Xet, the blob may itself be a link to a store of other names.
    blob = path.parent / os.readlink(path)
    digest = {64: hashlib.sha256(), 40: hashlib.sha1(b"blob %d\0" % blob.stat().st_size)}.get(len(blob.name))
    if blob.parent.name != "blobs" or digest is None:
        return
    with open(blob, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    if digest.hexdigest() != blob.name:
        for damaged in (blob.resolve(), blob, path):
            damaged.unlink(missing_ok=True)
        raise ValueError(
            f"{path.name} came from the Hub with other bytes than it has there (its hash differs); the damaged copy "
            "was deleted, load again to download it anew"
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload editor",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    patterns: Sequence[str] = ("*",),
    replaces: Sequence[str] = (),
    keep_card: bool = True,
) -> CommitInfo:
    """
    Uploads a folder in one commit: who downloads meanwhile gets the earlier state or this one.

    Args:
        folder (`str` or `Path`): The folder. It is only read.
        repo_id (`str`): The repository, made if it does not exist.
        commit_message (`str`, defaults to `"Upload editor"`): First line of the commit.
        commit_description (`str`, *optional*): The rest of it.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`str` or `bool`, *optional*): The user's token; the one that is logged in by default.
        revision (`str`, *optional*): Branch, made if it does not exist; `main` by default.
        create_pr (`bool`, defaults to `False`): Open a pull request instead.
        subfolder (`str`, *optional*): Folder in the repository.
        patterns (`Sequence[str]`): Which of the folder's files are sent.
        replaces (`Sequence[str]`): Patterns of files there that go if this folder has no file of their name, say
            shards of an earlier editor.
        keep_card (`bool`, defaults to `True`): Of a README.md that is there already, only the marked sections are
            replaced.

    Raises:
        HfHubHTTPError: The Hub refused; the message says what to do.
        OSError: The Hub could not be reached.
    """
    api = HfApi(library_name="hf_mend")
    try:
        repo_id = api.create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        attempt = 0
        while True:
            try:
                operations, parent = _operations(
                    api, Path(folder), repo_id, token, revision, subfolder or "", patterns, replaces, keep_card
                )
                # Not upload_folder: with hf_xet it may make several commits of one folder.
                return api.create_commit(
                    repo_id,
                    operations,
                    commit_message=commit_message,
                    commit_description=commit_description,
                    token=token,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=parent,
                )
            except HfHubHTTPError as error:
                attempt += 1
                if error.response.status_code != 412 or attempt == 3:
                    raise
                logger.info(f"somebody else has committed to {repo_id} meanwhile; once more")
    except HfHubHTTPError as error:
        error.append_to_message(f"\n{_advice(error.response.status_code, repo_id)}")
        raise
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a repository's id; it has the form 'user/name': {error}") from error
    except Exception as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        raise OSError(f"nothing was pushed to {repo_id}: {_brief(cause)}. {_advice(status, repo_id)}") from error


def _operations(
    api: HfApi,
    folder: Path,
    repo_id: str,
    token: str | bool | None,
    revision: str | None,
    subfolder: str,
    patterns: Sequence[str],
    replaces: Sequence[str],
    keep_card: bool,
) -> tuple[list[CommitOperationAdd | CommitOperationDelete], str | None]:
    """What a commit adds and deletes, and the commit that it follows."""
    info = api.model_info(repo_id, revision=revision, token=token)
    there = {file.rfilename for file in info.siblings or ()}
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    added: dict[str, CommitOperationAdd] = {}
    for path in matching_files(folder, patterns):
        name = prefix + path.relative_to(folder).as_posix()
        content: Any = path
        if path == folder / CARD_NAME and keep_card and name in there:
            words = Path(api.hf_hub_download(repo_id, name, revision=info.sha, token=token)).read_text("utf-8")
            content = with_sections_of(words, path.read_text("utf-8")).encode()
        added[name] = CommitOperationAdd(name, content)
    gone = [
        CommitOperationDelete(name)
        for name in sorted(there - set(added))
        if name.startswith(prefix) and any(fnmatch(name[len(prefix) :], pattern) for pattern in replaces)
    ]
    return [*gone, *added.values()], info.sha


def matching_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a folder whose path below it fits one of the patterns."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(fnmatch(path.relative_to(folder).as_posix(), pattern) for pattern in patterns)
    ]


def push_written(
    write: Callable[[Path], None], what: str, repo_id: str, *, replaces: Sequence[str], **options: Any
) -> CommitInfo:
    """
    Writes a folder and uploads it. If the upload fails, the folder stays, so that nothing is lost with the process.

    Args:
        write (`Callable`): Writes the folder that it is given.
        what (`str`): What is pushed, for messages.
        repo_id (`str`): The repository.
        replaces (`Sequence[str]`): See [`push_folder`].
        options: What else [`push_folder`] takes.
    """
    options.setdefault("commit_message", None)
    options["commit_message"] = options["commit_message"] or f"Upload {what}"
    work = Path(tempfile.mkdtemp(prefix="hf_mend-push-"))
    kept = False
    try:
        folder = work / what.replace(" ", "-")
        write(folder)
        kept = True
        info = push_folder(folder, repo_id, replaces=replaces, **options)
        kept = False
        return info
    except BaseException:
        if kept:
            logger.warning(
                f"the {what} was not pushed to {repo_id}. It is whole in {folder}: push again, or upload that folder"
            )
        raise
    finally:
        if not kept:
            shutil.rmtree(work, ignore_errors=True)


def _advice(status: int | None, repo_id: str) -> str:
    if status == 401:
        return f"Nothing was changed on the Hub. To write to {repo_id}, {_LOG_IN}."
    if status == 403:
        return (
            f"Nothing was changed on the Hub. Your token may not write to {repo_id}: use one with write access, "
            "another repository's name, or create_pr=True."
        )
    if status == 409 or status == 412:
        return f"Nothing was changed on the Hub. Somebody else is writing to {repo_id}; push again."
    if status == 429:
        return "Nothing was changed on the Hub. It limits requests for now; push again later."
    if status is not None and status < 500:
        return "Nothing was changed on the Hub."
    return "The repository has its earlier state or the whole new one; push again, what is there is not sent twice."


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
