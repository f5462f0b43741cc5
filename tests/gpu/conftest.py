"""Tests on a real GPU: python -m pytest -c tests/gpu/pytest.ini tests/gpu

They need torch, triton and transformers, neither Ray nor pydantic. Without a CUDA device they are skipped; with
GPU_REQUIRED=1 that is an error. In a visit (`make gpu`) each result goes to the visit's file at once, tests that have a
result there are left out, and a name such as "tests 3/12" of the step takes every twelfth test from the third on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from max_ray import kernels
from max_ray.benchmark.case_log import DEVICE_LOST, FAILED, FILE, PASSED, SKIPPED, STEP, CaseLog
from tests.gpu.device import REHEARSAL, check_device

HERE = Path(__file__).parent
_REHEARSED = 40  # of so many tests one is rehearsed, which takes the interpreter seconds
_log = pytest.StashKey[CaseLog]()


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("GPU_REQUIRED") == "1" and not torch.cuda.is_available():
        raise pytest.UsageError("GPU_REQUIRED=1, but PyTorch sees no CUDA device")
    if REHEARSAL:
        kernels.interpret_on_cpu()
    if FILE in os.environ:
        config.stash[_log] = CaseLog.from_environment("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not REHEARSAL:
                item.add_marker(skip)
    if _log in config.stash:
        kept = _share(items, os.environ[STEP])
        items[:] = [item for item in kept if not config.stash[_log].is_done(item.nodeid)]


def _share(items: list[pytest.Item], step: str) -> list[pytest.Item]:
    """The tests of one of several processes; those of test_model.py have a step of their own."""
    found = re.fullmatch(r".* (\d+)/(\d+)", step)
    if found is None:
        return items
    others = [item for item in items if item.path.name != "test_model.py"]
    number, count = int(found[1]) - 1, int(found[2]) if not REHEARSAL else _REHEARSED
    return others[number::count]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    log = item.config.stash.get(_log, None)
    if log is not None:
        log.start(item.nodeid)
    return (yield)  # type: ignore[misc]


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    log = item.config.stash.get(_log, None)
    if log is None or not (call.when == "call" or call.excinfo):
        return
    if call.excinfo is None:
        log.end(item.nodeid, PASSED, wall_s=call.duration)
    elif call.excinfo.errisinstance(pytest.skip.Exception):
        log.end(item.nodeid, SKIPPED, reason=str(call.excinfo.value))
    else:
        log.end(item.nodeid, FAILED, error=call.excinfo.exconly()[:2000])
        _end_where_the_device_is_lost()


def _end_where_the_device_is_lost() -> None:
    try:
        check_device()
    except RuntimeError as error:
        print(f"the device is lost, the process ends: {error}", flush=True)
        os._exit(DEVICE_LOST)


def pytest_sessionfinish(session: pytest.Session) -> None:
    log = session.config.stash.get(_log, None)
    if log is not None:
        log.finish()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _faithful_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if REHEARSAL:
        from tests.kernels.gpu.interpreter import correct_bfloat16

        correct_bfloat16(monkeypatch)
