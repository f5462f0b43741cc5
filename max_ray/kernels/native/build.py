"""Builds the C++ kernels with the machine's own compiler, once, and loads them: `library()`.

The shared object lies in the user's cache folder under a name made of everything it depends on: sources, flags, the
compiler's version and the processor's features. The folder has mode 0700; a file or folder that another user owns or
may change is not loaded. A machine without a compiler runs the reference implementations.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from max_ray.log import get_logger
from max_ray.private_files import UnsafePathError, check_private_file, make_private
from max_ray.settings import cache_dir, native_kernels

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-Wno-psabi")
_COMPILERS = ("g++", "c++")
_TIMEOUT_S = 1200
"""For one source: seconds of work, but a machine may be busy with much else."""
_logger = get_logger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels; None where they are switched off, cannot be built, or do not run on this processor."""
    if not native_kernels():
        return None
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        _logger.warning(
            "No C++ compiler (%s) was found: the CPU runs torch's operations, which are slower", " or ".join(_COMPILERS)
        )
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except UnsafePathError as error:
        _logger.warning("The C++ kernels are not loaded, the CPU runs torch's operations, which are slower: %s", error)
        return None
    except (OSError, subprocess.SubprocessError) as error:
        _logger.warning("The C++ kernels could not be built, the CPU runs torch's operations: %s", _reason(error))
        return None


def _built(compiler: str) -> Path:
    """The shared object for this machine, compiled if it is not there yet; one process compiles, others wait for it."""
    sources = sorted(_SOURCES.glob("*.cpp"))
    target = cache_dir() / "native" / f"{_fingerprint(compiler)}.so"
    if make_private(target.parent):
        _logger.warning("%s was open to other users: the C++ kernels are compiled again", target.parent)
        for untrusted in target.parent.glob("*.so"):
            untrusted.unlink(missing_ok=True)
    if target.exists():
        check_private_file(target)
        return target
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            started = time.monotonic()
            with TemporaryDirectory(dir=target.parent) as folder:
                _compile(compiler, sources, Path(folder)).rename(target)
            _logger.info("Compiled the C++ kernels in %.1f s: %s", time.monotonic() - started, target)
    return target


def _compile(compiler: str, sources: Sequence[Path], folder: Path) -> Path:
    """The shared object, made in `folder`: as many sources at once as there are processors."""

    def run(arguments: Sequence[str | Path]) -> None:
        command = [compiler, *_FLAGS, *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)

    objects = [folder / f"{source.stem}.o" for source in sources]
    largest_first = sorted(zip(sources, objects, strict=True), key=lambda pair: -pair[0].stat().st_size)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(lambda pair: run(["-c", pair[0], "-o", pair[1]]), largest_first))
    made = folder / "kernels.so"
    run(["-shared", "-o", made, *objects])
    return made


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout
    digest = hashlib.sha256(repr((_FLAGS, version, platform.machine(), _processor())).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What `-march=native` depends on: the first processor's features."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = [
        line for line in text.split("\n\n")[0].splitlines() if line.split("\t")[0] in ("flags", "Features", "model")
    ]
    return "\n".join(lines)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
        return lines[0] if lines else str(error)
    return str(error)
