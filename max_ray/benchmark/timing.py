"""How long device work takes, and what the machine does at best: the two ceilings that results are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from max_ray import kernels
from max_ray.errors import ConfigError
from max_ray.settings import variable

_SAMPLES = 7
_SAMPLE_S = 0.03  # of work in one sample
_MOST_REPEATS = 200
_ROTATED_BYTES = 256 * 1024**2  # several times the L2 cache of any GPU (H200: 50 MiB)


@dataclass(frozen=True)
class Machine:
    """copy_bytes_per_s: of a large copy, bytes read plus bytes written. matmul_flops_per_s: of a large square product
    of random numbers in the dtype that is measured."""

    name: str
    torch_version: str
    copy_bytes_per_s: float
    matmul_flops_per_s: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        on_gpu = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        return cls(name, torch.__version__, _copy_rate(device, 2**31 if on_gpu else 2**26), _matmul_rate(device, dtype))

    def floor_s(self, nbytes: float, flops: float) -> float:
        """The least time for work that moves so many bytes and does so many operations: the roofline."""
        return max(nbytes / self.copy_bytes_per_s, flops / self.matmul_flops_per_s)

    def lines(self) -> list[str]:
        return [
            f"{self.name}, torch {self.torch_version}",
            f"  copy         {self.copy_bytes_per_s / 1e9:.1f} GB/s, read plus written",
            f"  matmul       {self.matmul_flops_per_s / 1e12:.3f} TFLOP/s",
            "",
        ]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_device(name: str | None) -> torch.device:
    """The device of `--device`. With TRITON_INTERPRET=1 a CPU runs the Triton kernels in their interpreter.
    Raises ConfigError where the device, or what its kernels need, is not there."""
    available = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if available else "cpu"))
    if device.type == "cpu" and variable("TRITON_INTERPRET") == "1":
        kernels.interpret_on_cpu()
    if device.type == "cuda" and not available:
        raise ConfigError(f"--device {name} asks for a GPU, and PyTorch sees none here. Use --device cpu.")
    if device.type == "cuda" and find_spec("triton") is None:
        raise ConfigError("The kernels for GPUs need triton, which is not installed: pip install triton.")
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def choose_dtype(name: str) -> torch.dtype:
    """Raises ConfigError for another name than those of the flag's help."""
    if name not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"--dtype {name}: use bfloat16, float16 or float32.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def num_copies(nbytes: int, device: torch.device) -> int:
    """Copies of a call's inputs (of `nbytes`) that timed calls should use in turn, so that on a GPU no call finds its
    inputs in the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    return max(1, min(_MOST_REPEATS, -(-_ROTATED_BYTES // max(nbytes, 1))))


def seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median time of one call; calls take turns. On a GPU they are captured in one graph, so that the host's part does
    not count: a call must not wait for the device."""
    for call in calls:
        call()
    if device.type == "cuda":
        return _graph_seconds(calls)
    once = _wall(calls, len(calls)) / len(calls)
    repeats = _repeats(once, len(calls))
    return median(_wall(calls, repeats) for _ in range(_SAMPLES)) / repeats


def _repeats(once: float, num_calls: int) -> int:
    """Calls in one sample: each of `num_calls` calls at least once."""
    return max(num_calls, min(_MOST_REPEATS, int(_SAMPLE_S / max(once, 1e-6))))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wall(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    start = time.perf_counter()
    for i in range(repeats):
        calls[i % len(calls)]()
    return time.perf_counter() - start


def _graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    once = _replay_seconds(captured(calls, len(calls))) / len(calls)
    repeats = _repeats(once, len(calls))
    graph = captured(calls, repeats)
    _replay_seconds(graph)
    return median(_replay_seconds(graph) for _ in range(_SAMPLES)) / repeats


def captured(calls: Sequence[Callable[[], object]], repeats: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `repeats` calls."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            calls[i % len(calls)]()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _copy_rate(device: torch.device, nbytes: int) -> float:
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds([lambda: target.copy_(source)], device)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds([lambda: a @ b], device)
