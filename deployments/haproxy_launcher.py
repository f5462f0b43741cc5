"""Starts HAProxy for a server that only this machine may reach.

Ray Serve's HAProxy has two habits that do not suit a laptop: its statistics and Prometheus ports listen on every
interface, and it lives on, with its port, when the Ray that started it is killed. Serve can be told which program to
start as HAProxy; `install` writes one that narrows those two ports to loopback, asks the kernel to end it with its
parent, and then becomes HAProxy.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_WIDE = re.compile(r"^(\s*bind )\*?:(\d+)", re.MULTILINE)


def install(folder: Path, binary: str) -> Path:
    """Writes the program that starts `binary` this way and returns its path. Same inputs, same file."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "haproxy"
    text = f'#!/bin/sh\nexec "{sys.executable}" -I -S "{Path(__file__).resolve()}" "{binary}" "$@"\n'
    if not program.exists() or program.read_text() != text:
        fresh = program.with_suffix(f".{os.getpid()}")
        fresh.write_text(text)
        fresh.chmod(0o700)
        fresh.replace(program)  # atomic: another process may be starting it
    return program


def narrow(configuration: str) -> str:
    """The configuration with every port that listens on all interfaces on 127.0.0.1 instead."""
    return _WIDE.sub(r"\g<1>127.0.0.1:\2", configuration)


def main(binary: str, arguments: list[str]) -> None:
    """Narrows the file given with -f, ties this process to its parent, becomes HAProxy."""
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        file.write_text(narrow(file.read_text()))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
