"""The steps of a visit, in the order in which their results matter. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL_LIMIT_S = 540  # of all steps together
_PYTEST = ("-m", "pytest", "-c", "tests/gpu/pytest.ini", "-rf", "--tb=short")
_REHEARSED = (*_PYTEST, "-k", "not quantized_experts")  # half a minute each in the interpreter
_ONE_MODEL = (*_PYTEST, "-k", "greedy_tokens and True-1")
_NUM_TEST_PROCESSES = 12


@dataclass(frozen=True)
class Step:
    """One step of a visit.

    Args:
        name: Name in the results.
        limit_s: Seconds after which its processes are ended.
        command: Arguments of Python.
        rehearsal: The same on a CPU, with small sizes.
        num_processes: Processes that share the step's tests.
    """

    name: str
    limit_s: int
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    num_processes: int = 1


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"max_ray.benchmark.{name}", *arguments)


_ON_GPU = ("--device", "cuda")
_ON_CPU = ("--device", "cpu", "--dtype", "float32", "--shape", "tiny")
_OFFLINE = ("--peer", "none", "--batches", "1,8,64,256", "--context", "1024", "--steps", "32", "--prompt", "8192")
_OFFLINE_SMALL = ("--peer", "none", "--batches", "1,2", "--context", "17", "--steps", "2", "--prompt", "18")
_KERNELS_SMALL = ("--tokens", "3", "--context", "32", "--rows", "1")

STEPS = (
    Step("machine", 40, _module("gpu.machine", *_ON_GPU), _module("gpu.machine", *_ON_CPU)),
    Step("model", 60, (*_PYTEST, "tests/gpu/test_model.py"), (*_ONE_MODEL, "tests/gpu/test_model.py")),
    Step("offline", 100, _module("offline", *_ON_GPU, *_OFFLINE), _module("offline", *_ON_CPU, *_OFFLINE_SMALL)),
    Step("probe", 90, _module("gpu.probe", *_ON_GPU), _module("gpu.probe", *_ON_CPU)),
    Step("loop", 50, _module("gpu.serving_loop", *_ON_GPU), _module("gpu.serving_loop", *_ON_CPU)),
    Step("tests", 90, (*_PYTEST, "tests/gpu"), (*_REHEARSED, "tests/gpu"), _NUM_TEST_PROCESSES),
    Step("kernels", 70, _module("kernels", *_ON_GPU), _module("kernels", *_ON_CPU, *_KERNELS_SMALL)),
    Step("profile", 30, _module("gpu.profile", *_ON_GPU), _module("gpu.profile", *_ON_CPU)),
)
"""530 s in all: an expected 400 s, and room for a slow disk and first compilations."""
