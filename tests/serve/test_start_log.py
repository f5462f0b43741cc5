"""What of Ray's forwarded lines is printed while an application starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray._private import ray_logging

from max_ray.serve.start_log import StartLog


@pytest.fixture
def ray_log() -> Iterator[list[Any]]:
    """What Ray's forwarding of lines to the terminal prints; the fixture stands in for it."""
    dispatcher = ray_logging.global_worker_stdstream_dispatcher
    before, printed = dispatcher.handlers, []
    dispatcher.handlers = [("ray_print_logs", printed.append), ("of somebody else", lambda batch: None)]
    yield printed
    dispatcher.handlers = before


def test_what_serves_controller_writes_waits_for_the_end_of_the_start(ray_log: list[Any]) -> None:
    emit = ray_logging.global_worker_stdstream_dispatcher.emit
    batches = [{"actor_name": name, "lines": [str(i)]} for i, name in enumerate(["ServeController", "x", None])]
    log = StartLog()
    for batch in batches:
        emit(batch)
    assert ray_log == batches[1:]
    log.release()
    emit(batches[0])
    assert ray_log == [*batches[1:], batches[0], batches[0]]


def test_a_start_that_failed_for_a_reason_of_ours_prints_nothing_more(ray_log: list[Any]) -> None:
    emit = ray_logging.global_worker_stdstream_dispatcher.emit
    log = StartLog()
    emit({"actor_name": "ServeController"})
    log.silence()
    emit({"actor_name": "ServeController"})
    emit({"actor_name": "x"})
    log.release()
    emit({"actor_name": "x"})
    assert ray_log == []


def test_where_ray_prints_nothing_there_is_nothing_to_hold_back() -> None:
    dispatcher = ray_logging.global_worker_stdstream_dispatcher
    before = list(dispatcher.handlers)
    assert "ray_print_logs" not in dict(before)
    StartLog().silence()
    assert dispatcher.handlers == before
