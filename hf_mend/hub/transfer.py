"""Transfer of files: find them in a folder or on the Hub, and upload them to the Hub."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
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
from huggingface_hub.utils import get_session, validate_repo_id
from transformers.utils import logging

from .atomic import recover_folder
from .cards import CARD_NAME, with_sections_of
from .editor_files import MODEL_CONFIG_NAME, is_of_editor
from .files import EDITS_NAME, SCOPE_NAME, STORE_MAGIC, index_name, read_index, shortened


logger = logging.get_logger(__name__)

_LOG_IN = "log in with `hf auth login`, or pass token=... or set HF_TOKEN"


def find_files(
    name_or_path: str | Path,
    names: Sequence[str],
    subfolder: str | None = None,
    revision: str | None = None,
    **hub_kwargs: Any,
) -> dict[str, Path]:
    """
    Return the paths of files, which are downloaded from one commit if the name is not a folder.

    Args:
        name_or_path (`str` or `Path`): A folder, or a repository's id on the Hub.
        names (`Sequence[str]`): Names of the files. For a sharded file, the path of its index is returned; the shards
            are beside it.
        subfolder (`str`, *optional*): The folder of the files inside the folder or repository.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download` and the like, as for `hf_hub_download`.

    Raises:
        FileNotFoundError: The folder or repository, or one of the files, does not exist or cannot be reached.
        PermissionError: The repository exists and may not be read.
        ValueError: An index or a downloaded file is damaged.
        OSError: A download failed.
    """
    folder = Path(name_or_path)
    check_is_no_file(folder)
    recover_folder(folder)
    if folder.is_dir():
        return {name: _in_folder(folder / (subfolder or ""), name) for name in names}
    source = _Repository(str(name_or_path), subfolder, revision, hub_kwargs)
    return {name: source.find(name) for name in names}


def check_options(hub_kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        TypeError: An argument is none of `hf_hub_download`'s, which a folder would leave unseen.
    """
    known = inspect.signature(hf_hub_download).parameters
    for name in hub_kwargs:
        if name not in known:
            raise TypeError(
                f"there is no option {name!r} here, only those of hf_hub_download, such as revision and token; those "
                "of the base model go to its own from_pretrained, or to AutoEditableModel's"
            )


def check_is_no_file(path: Path) -> None:
    """
    Raises:
        NotADirectoryError: The path is a file's, which the Hub would be asked for as a repository.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        is_store = file.read(len(STORE_MAGIC)) == STORE_MAGIC
    if is_store:
        raise NotADirectoryError(
            f"{path} is a store of edits, which model.open_store({str(path)!r}) opens in Python, and EditStore of "
            "hf_mend without a model; what takes saved edits takes the folder that model.save_edits then writes"
        )
    raise NotADirectoryError(f"{path} is a file; give the folder that holds it, {path.parent}")


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
            raise FileNotFoundError(f"{path} does not exist; {_kind_of(folder, name)}")
    return found


def _kind_of(folder: Path, name: str) -> str:
    """What a folder holds that lacks the file that was looked for, in words."""
    if name == SCOPE_NAME:
        return f"the editor in {folder} has a scope, and is not whole without that file: copy or download it again"
    kinds = {
        "editor_config.json": "an editor, which AutoEditableModel.from_pretrained loads",
        EDITS_NAME: "edits, which load_edits loads",
        "adapter_config.json": "a PEFT adapter, which load_lora loads if it is a LoRA",
        MODEL_CONFIG_NAME: "a model, which AutoModelForCausalLM loads",
    }
    found = [words for name, words in kinds.items() if (folder / name).is_file()]
    return f"{folder} holds {found[0]}" if found else f"{folder} is not what save_pretrained or save_edits writes"


@dataclass
class _Repository:
    """Files of one commit of a repository on the Hub."""

    name: str
    subfolder: str | None
    revision: str | None
    hub_kwargs: dict[str, Any]

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
            raise download_error(error, self.name, self.revision, name) from error

    def _download(self, name: str) -> Path:
        path = Path(
            hf_hub_download(self.name, name, subfolder=self.subfolder, revision=self.revision, **self.hub_kwargs)
        )
        # Pin the commit: another one made between two downloads must not mix with it.
        self.revision = commit_of(path) or self.revision
        check_download(path)
        return path


def download_error(error: Exception, repo_id: str, revision: str | None, name: str | None = None) -> OSError:
    """
    Return the error for a download that failed, which names what was wanted and says what to do.

    Args:
        error (`Exception`): The error of huggingface_hub or of the network.
        repo_id (`str`): The repository.
        revision (`str`, *optional*): Branch, tag or commit.
        name (`str`, *optional*): The file; all of the repository when missing.
    """
    where = f"{repo_id} on the Hub"
    what = where if name is None else f"{name} of {where}"
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, GatedRepoError) or status == 403:
        return PermissionError(
            f"{where} may not be read with this token: ask for access there, then {_LOG_IN}: {cause}"
        )
    if isinstance(cause, RepositoryNotFoundError) or status == 401:
        return FileNotFoundError(f"{where} does not exist, or is private: check the name, and {_LOG_IN}: {cause}")
    if isinstance(cause, RevisionNotFoundError):
        return FileNotFoundError(f"{where} has no revision {revision!r}; leave revision out for main: {cause}")
    if isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError(
            f"{what} is not in the cache and could not be fetched ({_brief(cause)}); try again with a "
            "connection, without local_files_only and HF_HUB_OFFLINE"
        )
    if isinstance(error, EntryNotFoundError) and name is not None:
        return FileNotFoundError(
            f"{where} has no {name}; it is not what save_pretrained or save_edits writes: {error}"
        )
    return OSError(f"{what} could not be downloaded ({_brief(error)}); nothing was loaded, try again")


def is_reachable() -> bool:
    """
    Return whether the Hub answers, by one short request: where it does not, each download tries for half a minute.
    With `HF_HUB_OFFLINE` nothing is asked, and the answer is `False`.
    """
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(HfApi().endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OSError):
        return False
    return True


def commit_of(path: Path) -> str | None:
    """Return the commit of a file in the Hub's cache, or `None` for a file elsewhere."""
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", str(path))
    return found[1] if found else None


def check_is_repository(name: str, what: str) -> None:
    """
    Check that a name which came from the Hub is the id of a repository.

    Raises:
        ValueError: The name is a local path.
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
    Compare a downloaded file with the hash that the Hub gave for it, which is its name in the cache.

    Raises:
        ValueError: The hashes differ, since the file was damaged in transfer or in the cache. The file is deleted.
    """
    if not path.is_symlink():
        return  # no links on this file system, so the file has no other name
    # Follow one link only: with Xet, the blob may itself be a link to a store with other names.
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


@dataclass
class PushOptions:
    """
    The options of an upload.

    Args:
        commit_message (`str`, *optional*): First line of the commit message.
        commit_description (`str`, *optional*): The rest of the commit message.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`str` or `bool`, *optional*): The user's token; the one that is logged in by default.
        revision (`str`, *optional*): Branch, made if it does not exist; `main` by default.
        create_pr (`bool`, defaults to `False`): Open a pull request instead.
        subfolder (`str`, *optional*): Folder in the repository.
    """

    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False
    subfolder: str | None = None


def push_folder(
    folder: str | Path,
    repo_id: str,
    options: PushOptions,
    *,
    patterns: Sequence[str] = ("*",),
    replaces: Sequence[str] = (),
) -> CommitInfo:
    """
    Upload a folder in one commit, so that a download meanwhile gets the earlier state or the new one. Of a README.md
    in the repository, only the marked sections are replaced.

    Args:
        folder (`str` or `Path`): The folder, which is only read.
        repo_id (`str`): The repository, made if it does not exist.
        options ([`PushOptions`]): Commit, branch and token.
        patterns (`Sequence[str]`): Patterns of the files to upload.
        replaces (`Sequence[str]`): Patterns of files in the repository that are deleted if the folder has no file of
            that name, for example shards of an earlier editor.

    Raises:
        HfHubHTTPError: The Hub refused the upload; the message says what to do.
        OSError: The Hub could not be reached.
    """
    api = HfApi(library_name="hf_mend")
    token, revision, create_pr = options.token, options.revision, options.create_pr
    try:
        repo_id = api.create_repo(repo_id, token=token, private=options.private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        attempt = 0
        while True:
            try:
                operations, parent = _operations(api, Path(folder), repo_id, options, patterns, replaces)
                # Not upload_folder: with hf_xet it may make several commits of one folder.
                return api.create_commit(
                    repo_id,
                    operations,
                    commit_message=options.commit_message or "Upload editor",
                    commit_description=options.commit_description,
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
        raise OSError(f"the push to {repo_id} failed: {_brief(cause)}. {_advice(status, repo_id)}") from error


def _operations(
    api: HfApi,
    folder: Path,
    repo_id: str,
    options: PushOptions,
    patterns: Sequence[str],
    replaces: Sequence[str],
) -> tuple[list[CommitOperationAdd | CommitOperationDelete], str | None]:
    """Return the additions and deletions of a commit, and its parent commit."""
    info = api.model_info(repo_id, revision=options.revision, token=options.token)
    there = {file.rfilename for file in info.siblings or ()}
    prefix = f"{options.subfolder.strip('/')}/" if options.subfolder else ""
    added: dict[str, CommitOperationAdd] = {}
    for path in matching_files(folder, patterns):
        name = prefix + path.relative_to(folder).as_posix()
        if path == folder / MODEL_CONFIG_NAME and (name in there or not is_of_editor(path)):
            continue  # a model's stays
        content: Any = path
        if path == folder / CARD_NAME and name in there:
            words = Path(api.hf_hub_download(repo_id, name, revision=info.sha, token=options.token))
            content = with_sections_of(words.read_text("utf-8"), path.read_text("utf-8")).encode()
        added[name] = CommitOperationAdd(name, content)
    gone = [
        CommitOperationDelete(name)
        for name in sorted(there - set(added))
        if name.startswith(prefix) and any(fnmatch(name[len(prefix) :], pattern) for pattern in replaces)
    ]
    return [*gone, *added.values()], info.sha


def matching_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files of a folder whose relative path matches one of the patterns."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(fnmatch(path.relative_to(folder).as_posix(), pattern) for pattern in patterns)
    ]


def push_written(
    write: Callable[[Path], None], what: str, repo_id: str, *, replaces: Sequence[str], **push_kwargs: Any
) -> CommitInfo:
    """
    Write a folder and upload it. If the upload fails, the folder stays, so that nothing is lost with the process.

    Args:
        write (`Callable`): The function that writes the folder at the path it is given.
        what (`str`): The name of the upload in messages.
        repo_id (`str`): The repository.
        replaces (`Sequence[str]`): See [`push_folder`].
        push_kwargs: Fields of [`PushOptions`].
    """
    options = PushOptions(**push_kwargs)
    options = replace(options, commit_message=options.commit_message or f"Upload {what}")
    work = Path(tempfile.mkdtemp(prefix="hf_mend-push-"))
    kept = False
    try:
        folder = work / what.replace(" ", "-")
        write(folder)
        kept = True
        info = push_folder(folder, repo_id, options, replaces=replaces)
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
