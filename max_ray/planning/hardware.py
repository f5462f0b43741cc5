"""What a machine (or a cluster) has, as far as a plan needs to know it. No torch, no Ray."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from max_ray.settings import variable

MIB = 1024**2
GIB = 1024**3
_ANSWER_WITHIN_S = 10.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


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
    """NVIDIA GPUs that processes started here can use, without a CUDA library: there may be none."""
    return count_gpus(Path("/dev"), Path("/proc"), variable(_VISIBLE), _listed_gpus)


def count_gpus(dev: Path, proc: Path, visible: str | None, ask_driver: Callable[[], int]) -> int:
    """GPUs that CUDA would show.

    Args:
        dev: Folder of device files: nvidia0, nvidia1, ..; under WSL2 dxg alone.
        proc: Folder with driver/nvidia/gpus, which containers have whose device files were injected (CDI) otherwise.
        visible: CUDA_VISIBLE_DEVICES.
        ask_driver: Number of GPUs that the driver's own tool lists; asked only where no device file has a number.
    """
    count = sum(1 for path in dev.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit())
    if count == 0 and (dev / "dxg").exists() | (dev / "nvidiactl").exists() | (dev / "nvidia-caps").exists():
        count = ask_driver()
    if count == 0:
        count = sum(1 for _ in (proc / "driver" / "nvidia" / "gpus").glob("*"))
    return len(visible_gpus(visible, count))


def visible_gpus(visible: str | None, count: int) -> list[int | str]:
    """Numbers (or UUIDs) of the GPUs that CUDA shows, in its order, of `count` ones. As CUDA does it, the first entry
    that names no GPU ends the list."""
    if visible is None:
        return list(range(count))
    found: list[int | str] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.startswith(("GPU-", "MIG-")):
            found.append(entry)
        elif entry.isdigit() and int(entry) < count:
            found.append(int(entry))
        else:
            break
    return found


def _listed_gpus() -> int:
    return sum(1 for line in _nvidia_smi("--list-gpus").splitlines() if line.startswith("GPU "))


def _gpu_memory() -> tuple[GpuMemory, ...]:
    """Of the GPUs that CUDA shows, in its order: from NVML where `nvidia-ml-py` is installed, else from the driver's
    tool. No CUDA context is made. Empty where they do not answer."""
    found = nvml_memory()
    if found is None:
        query = ("--query-gpu=uuid,memory.total,memory.free", "--format=csv,noheader,nounits")
        found = parse_gpu_memory(_nvidia_smi(*query))
    return pick_visible(found, variable(_VISIBLE))


def _nvidia_smi(*arguments: str) -> str:
    try:
        command = ["nvidia-smi", *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_WITHIN_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout


def nvml_memory() -> dict[str, GpuMemory] | None:
    """Memory by UUID, in the order of the driver; None where NVML is not there."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        found = {}
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            found[str(nvml.nvmlDeviceGetUUID(handle))] = GpuMemory(int(memory.total), int(memory.free))
        return found
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def parse_gpu_memory(answer: str) -> dict[str, GpuMemory]:
    """Lines of "UUID, total, free" in MiB; empty when one is anything else (a device in MIG mode says "[N/A]")."""
    devices = {}
    for line in answer.strip().splitlines():
        uuid, *numbers = (field.strip() for field in line.split(","))
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            return {}
        devices[uuid] = GpuMemory(int(numbers[0]) * MIB, int(numbers[1]) * MIB)
    return devices


def pick_visible(devices: Mapping[str, GpuMemory], visible: str | None) -> tuple[GpuMemory, ...]:
    """Those that CUDA shows, by its numbers; empty where one of them is not listed (a part of a GPU)."""
    uuids, found = list(devices), []
    for gpu in visible_gpus(visible, len(devices)):
        if isinstance(gpu, int):
            found.append(devices[uuids[gpu]])
            continue
        matching = [uuid for uuid in uuids if uuid.startswith(gpu)]
        if len(matching) != 1:
            return ()
        found.append(devices[matching[0]])
    return tuple(found)
