"""Folders and files that only their user may change. Another user is played by a process with another uid, as root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from max_ray import private_files
from max_ray.private_files import UnsafePathError, check_private_file, make_private, runtime_folder
from tests.source_tree import ROOT

OTHER_USER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_folder_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert make_private(folder) is False
    assert mode_of(folder) == 0o700
    assert mode_of(folder.parent) == 0o755
    assert make_private(folder) is False


@pytest.mark.parametrize(("mode", "was_open"), [(0o755, False), (0o711, False), (0o775, True), (0o757, True)])
def test_an_own_folder_is_closed_and_said_to_have_been_open(tmp_path: Path, mode: int, was_open: bool) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    folder.chmod(mode)
    assert make_private(folder) is was_open
    assert mode_of(folder) == 0o700


@as_root
def test_what_another_user_owns_is_refused(tmp_path: Path) -> None:
    folder, file = tmp_path / "b", tmp_path / "c"
    folder.mkdir(mode=0o700)
    file.write_text("code")
    for path, check in ((folder, make_private), (file, check_private_file)):
        os.chown(path, OTHER_USER, OTHER_USER)
        with pytest.raises(UnsafePathError, match="belongs to user 65534"):
            check(path)


def test_links_and_open_files_are_refused(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("code")
    link.symlink_to(tmp_path)
    check_private_file(file)
    with pytest.raises(UnsafePathError, match="not a folder"):
        make_private(link)
    with pytest.raises(UnsafePathError, match="not a folder"):
        make_private(file)
    for mode in (0o664, 0o646):
        file.chmod(mode)
        with pytest.raises(UnsafePathError, match="may be changed by other users"):
            check_private_file(file)
    with pytest.raises(UnsafePathError, match="not a regular file"):
        check_private_file(link)


def test_a_parent_that_all_may_change_needs_the_sticky_bit(tmp_path: Path) -> None:
    parent = tmp_path / "shared"
    parent.mkdir()
    parent.chmod(0o777)
    with pytest.raises(UnsafePathError, match="chmod o-w"):
        make_private(parent / "mine")
    parent.chmod(0o1777)
    make_private(parent / "mine")


def test_the_runtime_folder_is_short_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "t"
    base.mkdir()
    base.chmod(0o1777)
    monkeypatch.setattr(private_files.tempfile, "gettempdir", lambda: str(base))
    folder = runtime_folder(200)
    assert folder == base / f"max_ray-{os.geteuid()}"
    assert mode_of(folder) == 0o700
    assert runtime_folder(200) == folder
    short = runtime_folder(29)  # TMPDIR is too long
    assert short.parent == Path("/tmp")
    assert len(str(short)) <= 29


@as_root
def test_a_runtime_folder_that_another_user_has_taken_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two users at once: each has a folder, also where one has made the other's beforehand."""
    base = tmp_path / "t"
    base.mkdir()
    base.chmod(0o1777)
    monkeypatch.setattr(private_files.tempfile, "gettempdir", lambda: str(base))
    taken = base / "max_ray-0"
    taken.mkdir()
    os.chown(taken, OTHER_USER, OTHER_USER)
    folder = runtime_folder(len(str(base)) + len("/max_ray-12345678"))
    assert folder not in (taken, base)
    assert mode_of(folder) == 0o700
    assert folder.stat().st_uid == 0
    if folder.parent == Path("/tmp") and not folder.name.endswith("-0"):
        folder.rmdir()


@as_root
def test_two_users_have_folders_of_their_own_and_cannot_enter_the_other_s() -> None:
    code = (
        f"import os, sys; sys.path.append({str(ROOT)!r}); from max_ray import private_files\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "folder = private_files.runtime_folder(27); print(folder)\n"
        f"os.listdir({str(runtime_folder(27))!r})"
    )
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert run.stdout, run.stderr
    other = Path(run.stdout.strip())
    assert other != runtime_folder(27)
    assert other.stat().st_uid == OTHER_USER
    assert "PermissionError" in run.stderr
    other.rmdir()
