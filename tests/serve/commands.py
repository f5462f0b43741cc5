"""The commands of the command line as processes of their own, and what they leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from tests.serve.conftest import free_port

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 150
MARK = "TEST_PROCESS_MARK"


def environment(**more: str) -> dict[str, str]:
    """This process's, without the settings that would change the command."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAX_RAY_", "RAY_"))}
    return {**kept, "PYTHONUNBUFFERED": "1", **more}


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that were started, by whomever, with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def still_alive(processes: Sequence[psutil.Process], within_s: float) -> list[str]:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return [" ".join(process.cmdline()) for process in alive]


def end(processes: Sequence[psutil.Process]) -> None:
    """Kills these processes and no others."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)


@contextmanager
def until_said(
    command: Sequence[str | Path], word: str, log: Path, **variables: str
) -> Iterator[tuple[psutil.Process, list[psutil.Process]]]:
    """Runs the command until it has printed the word: the process and everything it started by then."""
    with log.open("w") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment(**variables))
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while word not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield process, process.children(recursive=True)
    finally:
        end([*process.children(recursive=True), process] if process.is_running() else [])


@dataclass(frozen=True)
class OwnCluster:
    """A Ray that `ray start --head` has started for a test; `variables` lead commands to it."""

    process: psutil.Process
    variables: dict[str, str]

    def run(self, *command: str | Path, timeout_s: float = START_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / command[0], *command[1:]],
            capture_output=True,
            text=True,
            env=environment(**self.variables),
            timeout=timeout_s,
        )

    def processes(self, *names: str) -> list[psutil.Process]:
        """Those whose titles begin with one of the names, such as "ray::ModelWorker"."""
        children = self.process.children(recursive=True)
        return [child for child in children if _title(child).startswith(names)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@contextmanager
def own_cluster() -> Iterator[OwnCluster]:
    """Ports, temporary folder and token of its own. Only its own processes are ended: `ray stop` would end every Ray
    of the machine."""
    port, dashboard = free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="ray_", dir="/tmp"))  # short: sockets in it have long names
    command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [
        f"--temp-dir={folder}",
        "--num-cpus=4",
        f"--ray-client-server-port={free_port()}",
        "--disable-usage-stats",
    ]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex * 2}
    variables = {**token, "RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    try:
        with until_said(command, "Ray runtime started", folder / "log", **token) as (process, _):
            yield OwnCluster(process, variables)
            started = process.children(recursive=True)
            process.terminate()
            left = still_alive([process, *started], 30)
        assert left == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
