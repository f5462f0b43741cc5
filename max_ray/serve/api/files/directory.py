"""The folder of files: `file-ID.data` and `file-ID.json` a file, bounded in number and bytes, for its owner only.

One process at a time has a folder (a lock says so). What a process that died left half written is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from max_ray.errors import ConfigError, InputError, quoted
from max_ray.serve.api.objects.files import FileObject

MAX_FILE_BYTES = 200 * 2**20
"""Of an uploaded file, as of the OpenAI API."""
MAX_FILES = 10_000
MAX_NAME = 255
_UPLOAD_SILENCE_S = 600.0
"""An upload that gains nothing for so long is given up."""


class FileMissingError(InputError):
    """No such file is kept."""

    http_status = 404


class StorageFullError(InputError):
    """The folder has no room for more."""

    http_status = 413


@dataclass(frozen=True)
class StoredFile:
    """A complete file.

    Args:
        id: Its id, `file-...`.
        filename: The name that its client gave it.
        purpose: `batch`, or `batch_output` for results.
        bytes: Its size.
        created_at: Unix time in seconds.
        expires_at: Unix time in seconds at which it is removed; None: never.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None

    def public(self) -> FileObject:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "filename": self.filename,
            "purpose": self.purpose,
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "object": "file",
            "status": "processed",
        }


@dataclass(slots=True)
class _Upload:
    filename: str
    num_bytes: int
    heard_at: float


class FileDirectory:
    """The files of one folder, which is made where it is missing.

    Args:
        folder: The folder.
        max_bytes: Of all files together.
        max_files: How many are kept.
        max_file_bytes: Of one upload.
        clock: Unix time in seconds.

    Raises:
        ConfigError: The folder cannot be made or written, or another process has it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        max_files: int = MAX_FILES,
        max_file_bytes: int = MAX_FILE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self.clock = clock
        self._limits = (max_bytes, max_files, max_file_bytes)
        self._uploads: dict[str, _Upload] = {}
        self._files: dict[str, StoredFile] = {}
        self._file_bytes = 0
        self.extra_bytes = 0
        """Of results that are no files yet."""
        try:
            self._lock = _locked(folder)
            self._load()
        except OSError as error:
            raise ConfigError(f"files_dir={str(folder)!r} cannot be used: {error.strerror or error}.") from None

    @property
    def num_bytes(self) -> int:
        """Of files, uploads and results in progress."""
        uploads = sum(upload.num_bytes for upload in self._uploads.values())
        return self._file_bytes + uploads + self.extra_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes more may be written."""
        return self.num_bytes + num_bytes <= self._limits[0]

    def begin(self, filename: str) -> str:
        """Begins an upload and gives its id. Raises StorageFullError."""
        self._check_count()
        file_id = new_id("file-")
        (self.folder / f"{file_id}.part").touch(mode=0o600)
        self._uploads[file_id] = _Upload(filename[:MAX_NAME], 0, self.clock())
        return file_id

    def append(self, file_id: str, data: bytes) -> None:
        """Writes a piece of an upload. Raises StorageFullError, FileMissingError; the upload is gone then."""
        upload = self._upload(file_id)
        max_bytes, _, max_file_bytes = self._limits
        if upload.num_bytes + len(data) > max_file_bytes:
            self.abort(file_id)
            raise StorageFullError(f"The file is larger than {max_file_bytes} bytes. Split it.", param="file")
        if not self.has_room(len(data)):
            self.abort(file_id)
            raise StorageFullError(f"All files together may have {max_bytes} bytes. Delete some first.", param="file")
        with (self.folder / f"{file_id}.part").open("ab") as file:
            file.write(data)
        upload.num_bytes += len(data)
        upload.heard_at = self.clock()

    def complete(self, file_id: str, purpose: str, expires_after_s: int | None) -> StoredFile:
        """Makes a file of an upload. Raises FileMissingError for one that was given up."""
        upload = self._upload(file_id)
        file = self.adopt(self.folder / f"{file_id}.part", file_id, upload.filename, purpose, expires_after_s)
        del self._uploads[file_id]
        return file

    def abort(self, file_id: str) -> None:
        """Gives an upload up. Unknown ids are fine."""
        if self._uploads.pop(file_id, None) is not None:
            (self.folder / f"{file_id}.part").unlink(missing_ok=True)

    def adopt(self, path: Path, file_id: str, filename: str, purpose: str, expires_after_s: int | None) -> StoredFile:
        """Makes a file of one that lies in the folder already, under another name.

        Args:
            path: Where it lies; a missing one that was adopted before is the same file.
            file_id: Its id.
            filename: Its name.
            purpose: Of the file.
            expires_after_s: Seconds from now until it is removed; None: it stays.
        """
        data = self._data(file_id)
        if path.exists():
            os.replace(path, data)
        now = int(self.clock())
        expires_at = None if expires_after_s is None else now + expires_after_s
        file = StoredFile(file_id, filename, purpose, data.stat().st_size, now, expires_at)
        write_json(self.folder / f"{file_id}.json", asdict(file))
        self._file_bytes += file.bytes - (self._files[file_id].bytes if file_id in self._files else 0)
        self._files[file_id] = file
        return file

    def find(self, file_id: str) -> StoredFile:
        """Raises FileMissingError."""
        if file_id not in self._files:
            raise FileMissingError(f"There is no file {quoted(file_id)}: it was deleted, has expired, or never was.")
        return self._files[file_id]

    def path(self, file_id: str) -> Path:
        """Where a file's content lies. Raises FileMissingError."""
        self.find(file_id)
        return self._data(file_id)

    def read(self, file_id: str, offset: int, size: int) -> bytes:
        """At most `size` bytes of a file. Raises FileMissingError."""
        with self.path(file_id).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def delete(self, file_id: str) -> None:
        """Removes a file. Raises FileMissingError."""
        size = self.find(file_id).bytes
        (self.folder / f"{file_id}.json").unlink(missing_ok=True)
        self._data(file_id).unlink(missing_ok=True)
        del self._files[file_id]
        self._file_bytes -= size

    def files(self) -> list[StoredFile]:
        """All files, the oldest first."""
        return list(self._files.values())

    def purge(self, in_use: set[str]) -> None:
        """Removes what has expired, but for files in use, and gives up uploads that gain nothing."""
        now = self.clock()
        for file in self.files():
            if file.expires_at is not None and file.expires_at <= now and file.id not in in_use:
                self.delete(file.id)
        for file_id in [name for name, one in self._uploads.items() if one.heard_at + _UPLOAD_SILENCE_S <= now]:
            self.abort(file_id)

    def close(self) -> None:
        """Lets another process have the folder."""
        os.close(self._lock)

    def _check_count(self) -> None:
        if len(self._files) + len(self._uploads) >= self._limits[1]:
            raise StorageFullError(f"{self._limits[1]} files are kept, and no more. Delete some first.", param="file")

    def _upload(self, file_id: str) -> _Upload:
        if file_id not in self._uploads:
            raise FileMissingError("The upload was given up. Send the file again.")
        return self._uploads[file_id]

    def _data(self, file_id: str) -> Path:
        return self.folder / f"{file_id}.data"

    def _load(self) -> None:
        for path in self.folder.glob("file-*.part"):
            path.unlink()
        found = [StoredFile(**content) for _, content in read_all(self.folder, "file-*.json")]
        kept = [file for file in found if self._data(file.id).exists()]
        self._files = {file.id: file for file in sorted(kept, key=lambda file: file.created_at)}
        self._file_bytes = sum(file.bytes for file in kept)


def new_id(prefix: str) -> str:
    """An id that cannot be guessed."""
    return prefix + secrets.token_hex(16)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a small file as a whole or not at all."""
    part = path.with_suffix(".tmp")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_all(folder: Path, pattern: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The JSON files of a pattern."""
    for path in sorted(folder.glob(pattern)):
        yield path, json.loads(path.read_text(encoding="utf-8"))


def check_folder(folder: Path) -> None:
    """Makes a folder that is missing. Raises ConfigError for one that others than its owner can read, or no folder."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ConfigError(f"files_dir={str(folder)!r} cannot be used: {error.strerror or error}.") from None
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise ConfigError(f"files_dir={str(folder)!r} must belong to this user alone: give a new folder, or chmod 700.")


def _locked(folder: Path) -> int:
    """A lock on a folder. Raises ConfigError for one that is in use."""
    check_folder(folder)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(f"files_dir={str(folder)!r} is used by another server. Give each server its own.") from None
    return lock
