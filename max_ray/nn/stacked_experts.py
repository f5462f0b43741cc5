"""Weights of the experts of one layer, stacked for a grouped product: of rows of inputs sorted by expert with that
expert's weight, all in one go.

Axes: M rows of inputs, E experts, I in_dim, O out_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Union

import torch

from max_ray import kernels
from max_ray.kernels.quantized import PackedMatrix, of_stack, stack
from max_ray.nn.linear import MergedColumnParallelLinear, RowParallelLinear
from max_ray.nn.quantized_linear import PackedSegment, QuantizedWeight, Segment

Stack = Union[torch.Tensor, "QuantizedStack"]  # [E, O, I]
Layers = Sequence[MergedColumnParallelLinear | RowParallelLinear]


class PlainMemory:
    """The memory of the plain weights [O, I] of E experts' layers, in one piece. It is taken when the first of them is
    filled: never where all come quantized."""

    def __init__(self, layers: Layers, device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._stack: torch.Tensor | None = None
        for index, layer in enumerate(layers):
            layer.weight = layer.weight.to("meta")
            layer.defer_memory("weight", partial(self._allocate, index))

    def _allocate(self, index: int) -> torch.Tensor:
        like = self._layers[index].weight
        if self._stack is None and _quantized(self._layers):  # there will be no grouped product of plain weights
            return torch.empty_like(like, device=self._device)
        if self._stack is None:
            self._stack = torch.empty(len(self._layers), *like.shape, dtype=like.dtype, device=self._device)
        return self._stack[index]

    def stack(self) -> torch.Tensor | None:
        """[E, O, I] once all are filled. None where some came quantized: the others have memory of their own then."""
        if self._stack is not None and _quantized(self._layers):
            for layer in self._layers:
                if isinstance(layer.weight, torch.Tensor):
                    layer.weight = layer.weight.clone()
            self._stack = None
        assert self._stack is not None or _quantized(self._layers), "experts are stacked after loading"
        return self._stack


def _quantized(layers: Layers) -> list[QuantizedWeight]:
    weights: list[object] = [layer.weight for layer in layers]
    return [weight for weight in weights if isinstance(weight, QuantizedWeight)]


class QuantizedStack:
    """Quantized weights [O, I] of E experts, segment by segment."""

    def __init__(self, matrices: Sequence[PackedMatrix]) -> None:
        self._matrices = list(matrices)

    @classmethod
    def of(cls, layers: Layers) -> QuantizedStack | None:
        """None where the experts' segments are not all quantized alike, or have columns in an order of their own.

        The weights' tensors become parts of the stack: it takes no memory of its own."""
        weights = _quantized(layers)
        if len(weights) < len(layers):
            return None
        segments = list(zip(*(weight.segments for weight in weights), strict=False))
        if len({len(weight.segments) for weight in weights}) > 1:
            return None
        stacks = [_stack(alike) for alike in segments]
        matrices = [matrix for matrix in stacks if matrix is not None]
        if len(matrices) < len(stacks):
            return None
        for alike, matrix in zip(segments, matrices, strict=True):
            for index, segment in enumerate(alike):
                assert isinstance(segment, PackedSegment), "others are not stacked"
                segment.put(of_stack(matrix, index))
        return cls(matrices)

    def multiplies_groups(self, device: torch.device) -> bool:
        """See `kernels.multiplies_groups`."""
        return all(kernels.multiplies_groups(matrix, device) for matrix in self._matrices)

    def linear(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x [M, I] in groups of rows, ends int32 [E] where each ends -> [M, O]; rows after the last are anything."""
        y = x.new_empty(len(x), sum(matrix.rows for matrix in self._matrices))
        first = 0
        for matrix in self._matrices:
            kernels.grouped_quantized_linear(x, matrix, ends, y[:, first : first + matrix.rows])
            first += matrix.rows
        return y


def _stack(segments: Sequence[Segment]) -> PackedMatrix | None:
    packed = [segment for segment in segments if isinstance(segment, PackedSegment) and segment.order is None]
    return stack([segment.matrix for segment in packed]) if len(packed) == len(segments) else None
