"""What a machine (or a cluster) has, as far as a plan needs to know it. No torch, no Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

GIB = 1024**3


@dataclass(frozen=True)
class Hardware:
    """num_cpus: cores a worker group may use. memory_bytes: host memory. num_gpus: devices for workers."""

    num_cpus: int
    memory_bytes: int
    num_gpus: int

    @classmethod
    def local(cls) -> Hardware:
        """This machine: cores this process may run on, physical memory (or the container's limit), NVIDIA devices."""
        return cls(
            num_cpus=len(os.sched_getaffinity(0)),
            memory_bytes=min(_physical_memory(), _container_memory()),
            num_gpus=_count_nvidia_devices(),
        )


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_memory() -> int:
    """The cgroup's memory limit, or a number no machine reaches where there is none."""
    no_limit = 1 << 62
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else no_limit
    return no_limit


def _count_nvidia_devices() -> int:
    """Counts /dev/nvidia<N>, so that no CUDA library has to be loaded to know that there is no GPU."""
    return sum(1 for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit())
