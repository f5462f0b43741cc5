"""Watching which memory torch takes, on a CPU whose memory counts as a GPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from max_ray import kernels


def like_a_gpu(monkeypatch: pytest.MonkeyPatch, at_once: bool = True) -> None:
    """Weights stay as they are (nothing is packed), and memory is taken when a tensor is made. at_once: false for the
    way of a CPU."""
    monkeypatch.setattr(kernels, "has_native", lambda: False)
    monkeypatch.setattr("max_ray.nn.quantized_linear.takes_memory_at_once", lambda device: at_once)


class Allocations(TorchDispatchMode):
    """Shapes of the tensors of plain numbers (two bytes or more each) that this thread's operations take memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(value) for value in torch.utils._pytree.tree_leaves((args, kwargs))}
        for value in torch.utils._pytree.tree_leaves(result):
            is_plain = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize > 1
            if is_plain and not value.is_meta and _storage(value) not in given:
                self.shapes.append(tuple(value.shape))
        return result

    @property
    def largest(self) -> int:
        """Numbers of the largest one."""
        return max(torch.Size(shape).numel() for shape in self.shapes)


def _storage(value: object) -> int | None:
    is_there = isinstance(value, torch.Tensor) and not value.is_meta
    return value.untyped_storage().data_ptr() if is_there and isinstance(value, torch.Tensor) else None
