"""What is asked of NCCL, with a transport that stands for it: streams, communicators, and a rank that hangs."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
import torch

from max_ray.distributed import StepDeadline, TPGroup, all_gather, all_reduce, broadcast
from max_ray.driver import Download
from max_ray.engine.runner import ModelRunner
from max_ray.errors import WorkerGroupError
from tests.checkpoints import make_llama
from tests.gpu.models import Lab, request, tokens_of

CUDA = torch.device("cuda", 0)


class Transport:
    """Notes the options of each collective; like NCCL, it gives no work for one on the current stream."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.aborted = threading.Event()

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> None:
        self.calls.append(("allreduce", options.asyncOp))

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> None:
        self.calls.append(("broadcast", options.asyncOp))

    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor, options: Any) -> None:
        self.calls.append(("allgather", options.asyncOp))

    def abort(self) -> None:
        self.aborted.set()


def group(device: torch.device = CUDA) -> tuple[TPGroup, Transport, Transport]:
    data, control = Transport(), Transport()
    return TPGroup(0, 2, device, data, control), data, control


def test_collectives_stay_on_the_current_stream_and_words_have_a_communicator_of_their_own() -> None:
    tp, data, control = group()
    all_reduce(torch.ones(3), tp)
    all_gather(torch.ones(3), tp, 0)
    broadcast(torch.ones(3), tp)
    assert data.calls == [("allreduce", False), ("allgather", False)]
    assert control.calls == [("broadcast", False)]


def test_between_cpus_they_are_as_before() -> None:
    tp, data, _ = group(torch.device("cpu"))
    object.__setattr__(tp, "control_group", None)
    all_reduce(torch.ones(3), tp)
    broadcast(torch.ones(3), tp)
    assert data.calls == [("allreduce", True), ("broadcast", True)]


def test_a_wait_that_is_too_long_ends_with_an_error() -> None:
    tp, data, control = group()
    start = time.monotonic()
    with pytest.raises(WorkerGroupError, match=r"waited more than 0.3 s"), StepDeadline(tp, 0.3, 0.02):
        assert data.aborted.wait(20), "the wait never ended"
    assert 0.3 < time.monotonic() - start < 5
    assert control.aborted.is_set()


def test_many_short_waits_are_no_long_one() -> None:
    tp, data, _ = group()
    deadline = StepDeadline(tp, 0.3, 0.02)
    for _ in range(12):
        with deadline:
            time.sleep(0.05)
    time.sleep(0.4)
    assert not data.aborted.is_set()


def test_the_error_of_the_wait_is_kept_as_the_cause() -> None:
    tp, data, _ = group()

    def fail() -> None:
        with StepDeadline(tp, 0.1, 0.02):
            data.aborted.wait(20)
            raise RuntimeError("NCCL communicator was aborted")

    with pytest.raises(WorkerGroupError) as raised:
        fail()
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_the_thread_ends_with_the_deadline() -> None:
    deadline = StepDeadline(group()[0], 30.0, 0.02)
    thread = deadline._thread
    assert thread.is_alive()
    del deadline
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_run_whose_step_never_ends_fails(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step's tokens come only once the transport is aborted, as with a peer that hangs in a graph."""
    tp, data, _ = group()
    lab = Lab(make_llama(tmp_path / "m", tokenizer=False), torch.device("cpu"))
    runner: ModelRunner = lab.runner(None, 0)
    runner._deadline = StepDeadline(tp, 0.5, 0.02)
    wait, count = Download.wait, []

    def hanging(self: Download) -> torch.Tensor:
        count.append(1)
        if len(count) == 3:
            assert data.aborted.wait(20), "nothing ended the wait"
        return wait(self)

    monkeypatch.setattr(Download, "wait", hanging)
    with pytest.raises(WorkerGroupError, match="for a step"):
        tokens_of(runner, request([[5, 6, 7]], 6, [{}]))
    assert len(count) == 3
