"""What of Ray's forwarded lines is printed while an application starts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ray._private import worker

from max_ray.serve.start_log import StartLog


@pytest.fixture(autouse=True)
def _streams_as_before() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    yield
    sys.stdout, sys.stderr = streams


def forward(name: str | None, *lines: str, is_err: bool = True, pid: Any = 77) -> None:
    """Prints lines of another process as Ray does; its own code, so that a change of its format is found here."""
    batch = {"actor_name": name, "pid": pid, "ip": "::", "localhost": "::", "lines": lines}
    worker.print_worker_logs(batch, sys.stderr if is_err else sys.stdout)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("is_err", [True, False])
@pytest.mark.parametrize("color", ["", "0", "1"])
def test_what_serves_controller_writes_waits_for_the_end_of_the_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, color: str, is_err: bool
) -> None:
    def printed() -> str:
        captured = capsys.readouterr()
        return captured.err if is_err else captured.out

    monkeypatch.setenv("RAY_COLOR_PREFIX", color)
    log = StartLog()
    forward("ServeController", "Traceback", "  more", is_err=is_err)
    forward("ModelWorker", "loading", "(ServeController x", is_err=is_err)
    forward(None, "a task", is_err=is_err)
    text = printed()
    assert ["Traceback" in text, "loading" in text, "(ServeController x" in text, "a task" in text] == [0, 1, 1, 1]
    log.release()
    forward("ServeController", "later", is_err=is_err)
    assert [line.rpartition("77)")[2].removeprefix("\x1b[0m") for line in printed().splitlines()] == [
        " Traceback",
        "   more",
        " later",
    ]


def test_a_start_that_failed_for_a_reason_of_ours_prints_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    log = StartLog()
    forward("ServeController", "Traceback")
    log.silence()
    forward("ServeController", "Traceback")
    forward("ModelWorker", "bye")
    forward(None, "a node died", pid="raylet")
    log.release()
    forward("ModelWorker", "bye")
    print("max-ray: error: no such file", file=sys.stderr)
    assert capsys.readouterr() == ("", "max-ray: error: no such file\n")


def test_our_own_output_is_printed_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    log = StartLog()
    print("half", end="", flush=True)
    assert capsys.readouterr().out == "half"
    print(" a line")
    assert capsys.readouterr().out == " a line\n"
    assert not sys.stdout.isatty()
    log.release()


def test_lines_of_two_threads_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    log = StartLog()
    with ThreadPoolExecutor(4) as threads:
        list(
            threads.map(lambda name: [forward(name, "x" * 50) for _ in range(200)], ["ServeController", "A", "B", "C"])
        )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 600
    assert all(line.endswith("x" * 50) and line.count("pid=") == 1 for line in lines)
    log.release()
    assert len(capsys.readouterr().err.splitlines()) == 200
