"""How far loading is: bars on terminals, lines in logs, silence for quick loads; and the phases of a start."""

from __future__ import annotations

import logging

import pytest

from max_ray.phases import phase
from max_ray.weights import progress as module
from max_ray.weights.progress import LoadProgress

MIB = 1024**2


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_a_quick_load_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = LoadProgress(100, is_terminal=True)
    progress.add(100)
    progress.end()
    assert capsys.readouterr().err == ""


def test_a_bar_with_bytes_and_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_FIRST_AFTER_S", 0.0)
    progress = LoadProgress(400 * MIB, is_terminal=True)
    progress.add(100 * MIB)
    progress.add(300 * MIB)
    progress.end()
    bar = capsys.readouterr().err
    assert "loading weights: 100%" in bar
    assert "400M/400M" in bar
    assert "B/s" in bar
    assert bar.endswith("\n")


def test_a_line_every_few_seconds_without_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module._LOG, "info", lambda text, *values: lines.append(text % values))
    progress = LoadProgress(1000 * MIB, is_terminal=False)
    for _ in range(100):
        clock.now += 0.1
        progress.add(10 * MIB)
    assert len(lines) == 2
    assert "of 1000 MiB" in lines[0]


def test_phases_are_timed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("max_ray.phases")
    monkeypatch.setattr(logging.getLogger("max_ray"), "propagate", True)
    durations: dict[str, float] = {}
    with caplog.at_level(logging.INFO, logger.name), phase("load", "two ranks", durations):
        pass
    assert "startup: load took 0.00 s (two ranks)" in caplog.text
    assert 0 <= durations["load"] < 1
