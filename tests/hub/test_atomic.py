"""Files and folders that are replaced whole: what killed processes leave, permissions, and links."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hf_mend.hub.atomic import check_writable, made_folder, replaced_file, replaced_folder


KILLED = """
import os, sys
from hf_mend.hub.atomic import replaced_file, replaced_folder
with (replaced_folder if sys.argv[2] == "folder" else replaced_file)(sys.argv[1]) as work:
    os.kill(os.getpid(), 9)
"""


def write(path: Path, what: str) -> None:
    if what == "folder":
        with replaced_folder(path) as work:
            (work / "one").write_text("one")
    else:
        with replaced_file(path) as work:
            work.write_text("one")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_the_next_save_deletes_what_a_killed_one_left(tmp_path, what):
    path = tmp_path / "saved.[x]"
    subprocess.run([sys.executable, "-c", KILLED, str(path), what], check=False)
    left = [entry.name for entry in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".saved.[x].new-")
    strangers = [tmp_path / ".saved.[x].new-0123abcd-1-x", tmp_path / ".other.new-0123abcd-1-x"]
    for stranger in strangers:
        stranger.write_text("of a process on another machine, or of something else")
    with (replaced_folder if what == "folder" else replaced_file)(path):
        during = [entry.name for entry in tmp_path.iterdir() if f"-{os.getpid()}-" in entry.name]
        write(tmp_path / "other", what)
        assert len(during) == 1 and (tmp_path / during[0]).exists(), "what this process is writing stays"
    write(path, what)
    assert {entry.name for entry in tmp_path.iterdir()} == {"saved.[x]", "other", *(one.name for one in strangers)}


def test_permissions_stay(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    for path, what, usual, private in ((file, "file", 0o644, 0o600), (folder, "folder", 0o755, 0o700)):
        write(path, what)
        assert stat.S_IMODE(path.stat().st_mode) == usual
        os.chmod(path, private)
        write(path, what)
        assert stat.S_IMODE(path.stat().st_mode) == private


def test_names_are_flushed_with_the_files(tmp_path, monkeypatch):
    """In the order in which a power failure needs them."""
    real, flushed = os.fsync, []

    def fsync(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    made_folder(tmp_path / "a" / "b")
    assert flushed == [str(tmp_path), str(tmp_path / "a")]
    flushed.clear()
    write(tmp_path / "a" / "file", "file")
    assert flushed[-1] == str(tmp_path / "a") and ".file.new-" in flushed[0]
    flushed.clear()
    write(tmp_path / "c" / "folder", "folder")
    assert flushed[0] == str(tmp_path) and flushed[-1] == str(tmp_path / "c")
    assert sum(".folder.new-" in name for name in flushed) == 2, "the file and the folder's names"


def test_a_place_is_checked_without_a_trace(tmp_path):
    for place in (tmp_path, tmp_path / "new", tmp_path / "new" / "below"):
        check_writable(place)
    (tmp_path / "file").write_text("one")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="cannot be a folder, since .*file is a file; name another"):
            check_writable(place)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_place_that_the_system_refuses(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hf_mend.hub.atomic.tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match="new cannot be written .Permission denied.; name another folder"):
        check_writable(tmp_path / "new")


def test_files_in_a_folder_keep_their_permissions_and_new_ones_can_be_read(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, mode in (("kept", 0o640), ("rewritten", 0o660)):
        (folder / name).write_text("old")
        (folder / name).chmod(mode)
    with replaced_folder(folder) as work:
        for name in ("rewritten", "new"):
            (work / name).unlink(missing_ok=True)
            (work / name).write_text("new")
            (work / name).chmod(0o600)  # as safetensors writes
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {"kept": 0o640, "rewritten": 0o660, "new": 0o644}
