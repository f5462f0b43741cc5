"""Which GPUs there are, and the memory of the right ones, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from max_ray.planning import hardware
from max_ray.planning.hardware import MIB, GpuMemory, count_gpus, nvml_memory, parse_gpu_memory, pick_visible

THREE = {"GPU-aa1": GpuMemory(100, 40), "GPU-aa2": GpuMemory(200, 200), "GPU-b": GpuMemory(300, 10)}
A, B, C = THREE.values()


def machine(tmp_path: Path, *files: str) -> tuple[Path, Path]:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "dev", tmp_path / "proc"


@pytest.mark.parametrize(
    ("files", "listed", "visible", "count"),
    [
        ([], 0, None, 0),
        (["dev/nvidia0", "dev/nvidia1", "dev/nvidiactl", "dev/nvidia-uvm"], 9, None, 2),
        (["dev/nvidia0", "dev/nvidia1"], 9, "1", 1),
        (["dev/nvidia0", "dev/nvidia1"], 9, "-1", 0),
        (["dev/nvidia0", "dev/nvidia1"], 9, "1,7,0", 1),
        (["dev/nvidia3"], 9, "GPU-b", 1),
        (["dev/dxg"], 1, None, 1),  # WSL2
        (["dev/dxg"], 0, None, 0),  # with another maker's GPU
        (["dev/nvidiactl"], 2, None, 2),
        (["dev/nvidia-caps/x"], 1, None, 1),
        (["proc/driver/nvidia/gpus/0000:01/information"], 0, None, 1),  # CDI
    ],
)
def test_gpus_are_found(tmp_path: Path, files: list[str], listed: int, visible: str | None, count: int) -> None:
    assert count_gpus(*machine(tmp_path, *files), visible, lambda: listed) == count


def test_the_drivers_tool_is_not_asked_without_a_reason(tmp_path: Path) -> None:
    def fail() -> int:
        raise AssertionError("asked")

    assert count_gpus(*machine(tmp_path), None, fail) == 0
    assert count_gpus(*machine(tmp_path, "dev/nvidia0"), None, fail) == 1


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, (A, B, C)),
        ("2", (C,)),
        ("2,0", (C, A)),
        ("GPU-b,GPU-aa1", (C, A)),
        ("GPU-aa2,1", (B, B)),
        ("GPU-aa", ()),  # two begin so
        ("MIG-1", ()),
        ("0,-1,2", (A,)),
        ("none", ()),
    ],
)
def test_memory_is_that_of_the_visible_gpus_in_their_order(visible: str | None, found: tuple[GpuMemory, ...]) -> None:
    assert pick_visible(THREE, visible) == found


def test_memory_as_the_drivers_tool_prints_it() -> None:
    lines = "GPU-a, 100, 40\nGPU-b, 200, 200\n"
    assert parse_gpu_memory(lines) == {
        "GPU-a": GpuMemory(100 * MIB, 40 * MIB),
        "GPU-b": GpuMemory(200 * MIB, 200 * MIB),
    }
    assert parse_gpu_memory("GPU-a, [N/A], [N/A]\n") == parse_gpu_memory("") == {}


class NVMLError(Exception):
    """As pynvml has it."""


def nvml(uuids: list[str], fails: bool = False) -> Any:
    def memory(handle: int) -> Any:
        if fails:
            raise NVMLError
        return SimpleNamespace(total=1000 + handle, free=handle)

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(uuids),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetUUID=lambda handle: uuids[handle],
    )


def test_memory_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(["GPU-a", "GPU-b"]))
    assert nvml_memory() == {"GPU-a": GpuMemory(1000, 0), "GPU-b": GpuMemory(1001, 1)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert hardware._gpu_memory() == (GpuMemory(1001, 1),)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(["GPU-a"], fails=True))
    assert nvml_memory() is None


def test_without_nvml_the_drivers_tool_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda *arguments: "GPU-a, 100, 40\nGPU-b, 7, 6\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    assert nvml_memory() is None
    assert hardware._gpu_memory() == (GpuMemory(7 * MIB, 6 * MIB),)
