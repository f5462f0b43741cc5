"""How much of a GPU a KV cache may take: what is left when a step and the decode graphs have what they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch


class DeviceMemory(Protocol):
    """A device's memory, in bytes."""

    def info(self) -> tuple[int, int]:
        """(free, total); what torch keeps for later counts as free."""

    def watch(self) -> None:
        """Starts to watch for the largest use."""

    def largest(self) -> int:
        """Most bytes used since `watch`, beyond those used then."""


class CudaMemory:
    """Of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def info(self) -> tuple[int, int]:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)

    def watch(self) -> None:
        self.info()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_reserved(self._device)

    def largest(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - self._before


@dataclass(frozen=True)
class StepMemory:
    """Bytes, beside weights and cache. step: the largest step's, freed after it. graphs: all decode graphs'."""

    step: int
    graphs: int

    def left_for_cache(self, free: int, total: int, utilization: float) -> int:
        """Bytes for the cache, of `free` ones, where `utilization` is the share of `total` that may be used."""
        return max(0, free - int(total * (1 - utilization)) - self.step - self.graphs)


def measure(
    memory: DeviceMemory, largest_step: Callable[[], None], capture: Callable[[int], None], num_graphs: int
) -> StepMemory:
    """Measures a step and two graphs.

    Args:
        memory: The device's.
        largest_step: Takes the largest step.
        capture: Captures and keeps the graph with this number, the largest bucket being 0.
        num_graphs: Graphs that there will be. Those after the first share its memory, and cost what the second does.
    """
    memory.watch()
    largest_step()
    step = memory.largest()
    used = [memory.info()[0]]
    for number in range(min(2, num_graphs)):
        capture(number)
        used.append(memory.info()[0])
    costs = [max(0, before - after) for before, after in pairwise(used)]
    graphs = costs[0] + (num_graphs - 1) * costs[-1] if costs else 0
    return StepMemory(step, graphs)
