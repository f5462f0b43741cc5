"""Several ranks in one process, one thread each, joined by a real gloo group: tensor parallelism without processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch

from max_ray.distributed import TPGroup, init_tp_group

ResultT = TypeVar("ResultT")
CPU = torch.device("cpu")


def cut(size: int) -> list[TPGroup]:
    """The ranks of a group without transport: enough to build, load, and run what needs no collective."""
    return [TPGroup(rank=rank, size=size, device=CPU) for rank in range(size)]


def run_ranks(
    size: int, work: Callable[[TPGroup], ResultT], timeout_s: float = 30.0, init_method: str | None = None
) -> list[ResultT]:
    """What `work` gives on each rank, in rank order; the first error is raised."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(size) as threads:
        meeting_place = init_method or f"file://{Path(folder) / 'rendezvous'}"

        def rank_thread(rank: int) -> ResultT:
            tp = init_tp_group(rank, size, meeting_place, CPU, timeout_s)
            try:
                with torch.inference_mode():
                    return work(tp)
            finally:
                tp.destroy()

        return list(threads.map(rank_thread, range(size)))
