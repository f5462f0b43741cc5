"""`max-ray serve` and `serve run` as processes of their own, with a Ray of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serve.conftest import free_port

BIN = Path(sys.executable).parent
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray 2.60's own two agents spend a minute on telling a GCS that is gone that their raylet is gone, and then end."""


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAX_RAY_", "RAY_"))}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def test_serve_run_says_mistakes_in_a_sentence(tmp_path: Path) -> None:
    for argument, sentence in {
        "modl_path=x": "There is no setting 'modl_path'. Did you mean 'model_path'?",
        "port=http": "port should be a valid integer",
        f"model_path={tmp_path}": "config.json",
    }.items():
        run = subprocess.run(
            [BIN / "serve", "run", "deployments:app", argument],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=120,
        )
        assert run.returncode != 0
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr


@contextmanager
def serving(model: Path, port: int, log: Path) -> Iterator[tuple[psutil.Process, list[psutil.Process]]]:
    """`max-ray serve` until it is ready: the process and everything it started."""
    command = [BIN / "max-ray", "serve", "--model-path", str(model), "--port", str(port), "--num-threads", "1"]
    with log.open("w") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment())
    try:
        deadline = time.monotonic() + 150
        while "Serving" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield process, process.children(recursive=True)
    finally:
        for left in [*process.children(recursive=True), process] if process.is_running() else []:
            left.kill()


def still_alive(processes: list[psutil.Process], within_s: float) -> list[str]:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return [" ".join(process.cmdline()) for process in alive]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_an_ended_server_leaves_nothing_behind(tiny_llama: Path, tmp_path: Path, ending: signal.Signals) -> None:
    port, log = free_port(), tmp_path / "log"
    with serving(tiny_llama, port, log) as (process, started):
        curl = next(line.strip() for line in log.read_text().splitlines() if line.strip().startswith("curl "))
        answer = subprocess.run(["sh", "-c", f"{curl} --silent --max-time 60"], capture_output=True, text=True)
        assert '"finish_reason"' in answer.stdout, answer
        process.send_signal(ending)
        assert still_alive([process, *started], 10) == []
        assert "Stopping ..." in log.read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_driver_takes_the_ray_that_it_started_with_it(tiny_llama: Path, tmp_path: Path) -> None:
    port = free_port()
    with serving(tiny_llama, port, tmp_path / "log") as (process, started):
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200
        agents = [child for child in started if child.cmdline()[0].startswith(RAY_AGENTS)]
        process.kill()
        assert still_alive([process, *(child for child in started if child not in agents)], 15) == []
        assert still_alive(agents, 100) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
