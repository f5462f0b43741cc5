"""Custom architectures: a folder of Python code is imported here, and travels to workers as bytes.

A spec is a folder (`./my_model`), a folder and a module in it (`./models:my_model`), or an installed module
(`my_package.families`, `my_package.families:MY_LIST`). A folder is imported under a name that holds the hash of its
content, `my_model_<hash>`: two folders of the same name do not collide, and a class pickled in one process is found
under the same name in another, once `install_packed` has run there. So a folder imports its own modules relatively
(`from .arch import my_arch`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from max_ray import settings
from max_ray.architecture import SupportedArchitecture, list_of_records
from max_ray.errors import ConfigError
from max_ray.private_files import UnsafePathError, make_private

MAX_BYTES = 16 * 1024 * 1024
_DIGEST_LENGTH = 16
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class PackedCode:
    """Code on its way to a worker. `archive`: a zip of the folder's files, whose content hash is `digest`; both
    empty for an installed module, which every node must have. `attribute`: the list to look for."""

    name: str
    digest: str = ""
    archive: bytes = field(default=b"", repr=False)
    attribute: str = "ARCHITECTURES"

    @property
    def module_name(self) -> str:
        return f"{self.name}_{self.digest}" if self.digest else self.name


@dataclass(frozen=True)
class _Source:
    """A spec taken apart: a folder, or (folder None) an installed module."""

    name: str
    folder: Path | None
    attribute: str = "ARCHITECTURES"


def import_architectures(spec: str) -> list[SupportedArchitecture]:
    """The records that a spec's code lists. Imports the code, once for the same content.

    Raises ConfigError: no such folder, no __init__.py, code that fails (with file and line), no ARCHITECTURES.
    """
    return list_of_records(import_spec(spec), _what(spec), _parse(spec).attribute)


def import_spec(spec: str) -> ModuleType:
    """The module that a spec's list stands in. Raises ConfigError as `import_architectures`."""
    source = _parse(spec)
    if source.folder is None:
        return _import_installed(source.name, _what(spec))
    digest = _digest(_files(source.folder))
    return _import_folder(f"{source.name}_{digest}", source.folder, _what(spec))


def pack_architectures(specs: Sequence[str]) -> tuple[PackedCode, ...]:
    """The code of the specs, ready to travel. Raises ConfigError as `import_architectures`, and for a folder of more
    than 16 MiB. Leaves out __pycache__ and hidden files. Runs none of the code."""
    return tuple(_pack(_parse(spec)) for spec in specs)


def install_packed(packed: Sequence[PackedCode]) -> list[SupportedArchitecture]:
    """Unpacks (once a content, in the user's cache folder), imports, and returns the records. Raises ConfigError."""
    records: list[SupportedArchitecture] = []
    for code in packed:
        what = _what(code.name)
        folder = _unpack(code) if code.digest else None
        module = (
            _import_installed(code.name, what) if folder is None else _import_folder(code.module_name, folder, what)
        )
        records += list_of_records(module, what, code.attribute)
    return records


def _what(name: str) -> str:
    """How messages about a spec begin."""
    return f"The custom architecture {name}"


def _parse(spec: str) -> _Source:
    """Raises ConfigError for a spec that is neither a folder with __init__.py nor an installed module."""
    left, _, right = spec.partition(":")
    folder = Path(left).expanduser().absolute()
    if folder.is_dir() and right:
        folder = folder.joinpath(*right.split("."))
    if folder.is_dir():
        if not (folder / "__init__.py").is_file():
            raise ConfigError(
                f"The custom architecture {spec} has no __init__.py: add one that defines ARCHITECTURES = [my_arch]."
            )
        folder = folder.resolve()
        return _Source(re.sub(r"\W", "_", folder.name), folder)
    if _MODULE_NAME.fullmatch(left) and _is_installed(left):
        return _Source(left, None, right or "ARCHITECTURES")
    if folder.is_file():
        raise ConfigError(f"The custom architecture {spec} is a file: give the folder that it is in.")
    raise ConfigError(
        f"There is no custom architecture {spec}: give a folder with an __init__.py that defines ARCHITECTURES, "
        f"or an installed module."
    )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _import_folder(module_name: str, folder: Path, what: str) -> ModuleType:
    """Imports a package folder under a name of our choice; the same name is the same content."""
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(
        module_name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None, f"no import spec for {folder}"
    assert spec.loader is not None, f"no loader for {folder}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        _forget(module_name)
        raise ConfigError(f"{what} cannot be imported: {_describe(error, folder)}.") from error
    return module


def _import_installed(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f"{what} cannot be imported: {_describe(error)}.") from error


def _forget(module_name: str) -> None:
    """Drops a module that failed half-way, and its submodules, so that a second attempt starts afresh."""
    for name in [n for n in sys.modules if n == module_name or n.startswith(f"{module_name}.")]:
        del sys.modules[name]


def _describe(error: Exception, folder: Path | None = None) -> str:
    """The error in words, with the last line that led to it: of the code in `folder`, or of any."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    if (
        folder is not None
        and isinstance(error, ModuleNotFoundError)
        and (error.name or "").split(".")[0] == folder.name
    ):
        text += " (a custom architecture imports its own modules relatively: from .arch import ...)"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if (Path(frame.filename).is_relative_to(folder) if folder else not frame.filename.startswith("<frozen"))
    ]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


def _pack(source: _Source) -> PackedCode:
    if source.folder is None:
        return PackedCode(source.name, attribute=source.attribute)
    files = _files(source.folder)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(name, _ZIP_DATE), content, zipfile.ZIP_DEFLATED)
    return PackedCode(source.name, _digest(files), buffer.getvalue(), source.attribute)


def _files(folder: Path) -> list[tuple[str, bytes]]:
    """(relative path, content) of what belongs to the code, sorted. Raises ConfigError past 16 MiB."""
    files: list[tuple[str, bytes]] = []
    total = 0
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_left_out(name))
        for name in names:
            file = Path(root) / name
            if _is_left_out(name) or not file.is_file():
                continue
            total += file.stat().st_size
            if total > MAX_BYTES:
                raise ConfigError(
                    f"The custom architecture folder {folder} holds more than {MAX_BYTES // 2**20} MiB: keep weights "
                    f"and data elsewhere, it is copied to every worker."
                )
            files.append((file.relative_to(folder).as_posix(), file.read_bytes()))
    return sorted(files)


def _is_left_out(name: str) -> bool:
    return name == "__pycache__" or name.startswith(".") or name.endswith(".pyc")


def _digest(files: list[tuple[str, bytes]]) -> str:
    """Hash of names and contents, lengths included, so that no two different folders look the same."""
    hasher = hashlib.blake2b(digest_size=_DIGEST_LENGTH // 2)
    for name, content in files:
        hasher.update(f"{len(name)}:{name}:{len(content)}:".encode())
        hasher.update(content)
    return hasher.hexdigest()


def _unpack(code: PackedCode) -> Path:
    """The folder with the code, written once. Raises ConfigError when the bytes are not those that were packed,
    or when another user may change the cache folder."""
    parent = settings.cache_dir() / "custom_architectures"
    folder = parent / f"{code.name}_{code.digest}"
    try:
        make_private(parent)
    except UnsafePathError as error:
        raise ConfigError(f"The custom architecture {code.name} cannot be unpacked: {error}") from None
    if folder.is_dir() and _digest(_files(folder)) == code.digest:
        return folder
    fresh = Path(tempfile.mkdtemp(dir=parent, prefix=".new_"))
    try:
        with zipfile.ZipFile(io.BytesIO(code.archive)) as archive:
            archive.extractall(fresh)
        if _digest(_files(fresh)) != code.digest:
            raise ConfigError(f"The custom architecture {code.name} arrived damaged: its content hash differs.")
        _move_into_place(fresh, folder, code.digest)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _move_into_place(fresh: Path, folder: Path, digest: str) -> None:
    """Atomic: another process that unpacks the same code at the same time is no harm."""
    if folder.exists() and _digest(_files(folder)) != digest:
        shutil.rmtree(folder)
    try:
        os.replace(fresh, folder)
    except OSError:
        if not folder.is_dir() or _digest(_files(folder)) != digest:
            raise
