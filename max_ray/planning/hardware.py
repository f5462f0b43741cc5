"""What a machine (or a cluster) has, as far as a plan needs to know it. No torch, no Ray."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIB = 1024**2
GIB = 1024**3
_ANSWER_WITHIN_S = 10.0


@dataclass(frozen=True)
class GpuMemory:
    """Bytes. What other processes hold is in `total` and not in `free`."""

    total: int
    free: int


@dataclass(frozen=True)
class Hardware:
    """num_cpus: cores a worker group may use. memory_bytes: host memory. num_gpus: devices for workers.
    gpu_memory: of each device by its number; empty where it cannot be seen from here."""

    num_cpus: int
    memory_bytes: int
    num_gpus: int
    gpu_memory: tuple[GpuMemory, ...] = ()

    @classmethod
    def local(cls) -> Hardware:
        """This machine: cores this process may run on, physical memory (or the container's limit), NVIDIA devices."""
        num_gpus = _count_nvidia_devices()
        return cls(
            num_cpus=len(os.sched_getaffinity(0)),
            memory_bytes=min(_physical_memory(), _container_memory()),
            num_gpus=num_gpus,
            gpu_memory=_gpu_memory() if num_gpus else (),
        )


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_memory() -> int:
    """The cgroup's memory limit, or a number that no machine reaches without one."""
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


def _gpu_memory() -> tuple[GpuMemory, ...]:
    """What the driver's own tool says, so that no CUDA context is made; empty where it does not answer."""
    command = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_WITHIN_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpu_memory(answer)


def parse_gpu_memory(answer: str) -> tuple[GpuMemory, ...]:
    """Lines of "total, free" in MiB; empty when one is anything else (a device in MIG mode says "[N/A]")."""
    devices = []
    for line in answer.strip().splitlines():
        numbers = [field.strip() for field in line.split(",")]
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            return ()
        devices.append(GpuMemory(int(numbers[0]) * 1024**2, int(numbers[1]) * 1024**2))
    return tuple(devices)
