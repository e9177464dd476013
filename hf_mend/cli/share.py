"""`hf-mend push` and `hf-mend pull`: upload and download editors, edits and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Report


def push(
    folder: Annotated[Path, typer.Argument(help="An editor, saved edits or a LoRA adapter.")],
    repo_id: Annotated[str, typer.Argument(help="The repository: user/name. Made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="The commit's message.")] = None,
    as_json: AsJson = False,
) -> Report:
    """
    Upload an editor, saved edits or an adapter in one commit, after checking the files. A card there keeps its text.

    \b
    Example:
      hf-mend push my-editor me/my-editor --private
    """
    import shutil

    from ..edits.edits_file import has_edits
    from ..hub.atomic import stays_within
    from ..hub.cards import CARD_NAME, update_card, use_section
    from ..hub.transfer import push_written
    from .contents import read_contents

    contents = read_contents(folder)

    def write(work: Path) -> None:
        work.mkdir()
        for name in contents.files:
            if not stays_within(folder / name, folder):
                raise ValueError(
                    f"{folder / name} is a link out of the folder, to {(folder / name).resolve()}, and would publish "
                    "that file; put the file itself there"
                )
            shutil.copyfile(folder / name, work / name)
        if contents.kind == "editor" and CARD_NAME in contents.files:
            update_card(work, {"use": use_section(repo_id)})

    info = push_written(
        write,
        contents.kind,
        repo_id,
        replaces=contents.replaces,
        commit_message=message,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
    )
    place = info.pr_url or info.commit_url
    document = {"kind": contents.kind, "repo_id": repo_id, "url": str(place), "commit": info.oid}
    text = f"The {contents.kind} is at {place}"
    if contents.kind == "editor" and has_edits(folder):
        text += f"\nThe edits in {folder} stay here; from a folder of their own, hf-mend push uploads them too"
    return Report({**document, "files": contents.files}, text)


def pull(
    repo_id: Annotated[str, typer.Argument(help="The repository: user/name.")],
    folder: Annotated[Path, typer.Argument(help="Where to put it.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    as_json: AsJson = False,
) -> Report:
    """
    Download an editor, saved edits or an adapter, and check the files. An earlier folder stays whole if that fails.

    \b
    Example:
      hf-mend pull me/my-editor my-editor
    """
    import shutil

    from ..hub.atomic import check_writable, replaced_folder
    from .contents import fetch, read_contents

    check_writable(folder)
    cached = fetch(repo_id, revision)
    contents = read_contents(cached, f"{repo_id} on the Hub")
    with replaced_folder(folder) as work:
        for name in contents.files:
            shutil.copyfile(cached / name, work / name)
    document = {"kind": contents.kind, "repo_id": repo_id, "commit": cached.name, "folder": str(folder)}
    return Report({**document, "files": contents.files}, f"The {contents.kind} of {repo_id} is in {folder}")
