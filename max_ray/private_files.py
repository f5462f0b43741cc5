"""Folders and files that only this user may change: what is loaded as code, and sockets that give orders.

The standard library is all that this module imports: `serve/haproxy_launcher.py` runs it without installed packages.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


class UnsafePathError(PermissionError):
    """Another user owns a folder or file, or may change it. An OSError; the message names the path and the remedy."""


def make_private(folder: Path) -> bool:
    """Creates a folder of mode 0700, or gives an own one that mode.

    Args:
        folder: Path of the folder; parents are created with the usual mode.

    Returns:
        True where other users could have written to the folder before: its content cannot be trusted.

    Raises:
        UnsafePathError: Another user owns the folder, it is no folder, or other users may replace it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafePathError(f"{folder} is not a folder. Remove it.")
    _check_owner(folder, found)
    check_not_replaceable(folder)
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return bool(found.st_mode & 0o022)


def check_private_file(file: Path) -> None:
    """Raises UnsafePathError unless `file` is a regular file of this user that no other user may write to."""
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise UnsafePathError(f"{file} is not a regular file. Remove it.")
    _check_owner(file, found)
    if found.st_mode & 0o022:
        raise UnsafePathError(f"{file} may be changed by other users (mode {found.st_mode & 0o777:o}). Remove it.")


def check_not_replaceable(path: Path) -> None:
    """Raises UnsafePathError where every user may rename or remove `path` or a folder above it.

    A folder that all may write to is fine with the sticky bit, as /tmp has it. Groups are trusted: of a path whose last
    folder is private, a group may at most take the place.
    """
    for parent in Path(os.path.abspath(path)).parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise UnsafePathError(f"{parent} may be changed by all users (mode {mode & 0o777:o}). Run chmod o-w on it.")


def runtime_folder(longest: int) -> Path:
    """A private folder of this user for sockets, whose paths are short.

    `max_ray-UID` below TMPDIR or /tmp. Where another user has taken that name, a new folder with a name by chance.

    Args:
        longest: Most characters that the path may have.
    """
    temporary = Path(tempfile.gettempdir())
    for base in (temporary, Path("/tmp")):
        folder = base / f"max_ray-{os.geteuid()}"
        if len(str(folder)) > longest:
            continue
        try:
            make_private(folder)
        except UnsafePathError:
            continue
        return folder
    base = temporary if len(str(temporary)) + len("/max_ray-12345678") <= longest else Path("/tmp")
    return Path(tempfile.mkdtemp(prefix="max_ray-", dir=base))


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise UnsafePathError(f"{path} belongs to user {found.st_uid}, not to the user of this process. Remove it.")
