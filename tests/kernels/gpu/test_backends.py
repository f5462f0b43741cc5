"""Which backend runs, and that the Triton kernels can stand in for the reference implementations.

python -m pytest tests/kernels/gpu/test_backends.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from max_ray import kernels
from max_ray.kernels import native, reference

ON_GPU: Any = SimpleNamespace(is_cuda=True)


@pytest.fixture(autouse=True)
def _choice_is_made_anew() -> Iterator[None]:
    kernels._gpu_backend.cache_clear()
    yield
    kernels._gpu_backend.cache_clear()


def test_tensors_on_a_cpu_go_to_the_compiled_kernels_where_they_are() -> None:
    assert kernels._backend(torch.empty(1)) is (reference if native.library() is None else native)


def test_tensors_on_a_gpu_go_to_the_triton_kernels() -> None:
    pytest.importorskip("triton")
    assert kernels._backend(ON_GPU).__name__ == "max_ray.kernels.gpu"


def test_a_gpu_without_triton_gets_the_reference_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels._logger, "propagate", True)
    assert kernels._backend(ON_GPU) is reference
    assert "triton is not installed" in caplog.text


TORCH_ONLY = {"quantized_rows"}  # one for all devices
CPU_ONLY = {"argmax", "decode_slots", "gather_rows", "positions", "sum_rows"}  # a GPU has torch's own

OF_ONE_BACKEND = [
    "interpret_on_cpu",
    "is_interpreted",
    "multiplies_groups",
    "new_matrix",
    "new_packed",
    "pack_weight",
    "tile_blocks",
]


@pytest.mark.parametrize("name", sorted(set(reference.__all__) - TORCH_ONLY - CPU_ONLY))
def test_backends_have_the_same_signature(name: str) -> None:
    pytest.importorskip("triton")
    from max_ray.kernels import gpu

    assert inspect.signature(getattr(gpu, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("name", sorted(set(reference.__all__) - TORCH_ONLY))
def test_compiled_kernels_have_the_same_signature(name: str) -> None:
    assert inspect.signature(getattr(native, name)) == inspect.signature(getattr(reference, name))


def test_every_operation_has_its_backends() -> None:
    assert sorted(kernels.__all__) == sorted([*reference.__all__, *OF_ONE_BACKEND])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_and_append_is_its_two_steps(interleaved: bool) -> None:
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    angles, positions, slots = torch.rand(9, 6), torch.tensor([8, 0, 3]), torch.tensor([5, 0, 2])
    caches, expected_caches = (torch.zeros(2, 2, 4, 2, 8).unbind(0) for _ in range(2))
    rotated, rotated_k = kernels.apply_rope(q, k, angles, positions, interleaved=interleaved)
    kernels.append_paged_kv_cache(rotated_k, v, *expected_caches, slots)
    out = kernels.rope_and_append(q, k, v, *caches, angles, positions, slots, interleaved=interleaved)
    assert torch.allclose(out, rotated)
    assert torch.allclose(caches[0], expected_caches[0])
    assert torch.equal(caches[1], expected_caches[1])
