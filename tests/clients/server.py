"""The server under test: `max-ray serve` on a free port, ended by SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.source_tree import ROOT

START_S = 600
STOP_S = 120
KV_CACHE_GIB = "1"  # the default is most of the machine, and the clients need memory, too

ServerContext = AbstractContextManager[str]


@contextmanager
def running_server(model: Path, log: Path) -> Iterator[str]:
    """Serves a model.

    Args:
        model: a GGUF file or a folder.
        log: where the server's output goes.

    Yields:
        The URL, without `/v1`.
    """
    port = _free_port()
    command = [sys.executable, "-m", "max_ray.cli.main", "serve", "--model-path", str(model), "--port", str(port)]
    command += ["--kv-cache-memory", KV_CACHE_GIB]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(STOP_S)


def model_name(url: str) -> str:
    """The name under which the server offers its model."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as reply:
        return str(json.load(reply)["data"][0]["id"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not _answers(url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"The server did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
