"""Mxfp4Checkpoint: gpt-oss as it is published (quant_method "mxfp4"), its experts dequantized while they are read.

With E experts, R outputs and K inputs of a matrix, `X` [E, K, R] of a bfloat16 checkpoint is stored as

    X_blocks  uint8 [E, R, K/32, 16]   element 2i of a group in the low nibble of byte i, 2i + 1 in the high one
    X_scales  uint8 [E, R, K/32]       power of two, 127 more

A nibble is a float of 4 bits, e2m1 (OCP Microscaling Formats 1.0, 2023): sign, then the numbers of _VALUES.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from max_ray.errors import WeightsError
from max_ray.weights.source import WeightSource

if TYPE_CHECKING:
    import torch

    from max_ray.weights.safetensors_header import TensorEntry

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32
_BIAS = 127


class Mxfp4Checkpoint(WeightSource):
    """The other tensors are as in the source. Raises WeightsError for blocks and scales that do not belong together."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        stored = source.names()
        self._packed = {name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)}
        hidden = {f"{name}{kind}" for name in self._packed for kind in (_BLOCKS, _SCALES)}
        self._names = [*(name for name in stored if name not in hidden), *sorted(self._packed)]
        for name in self._packed:
            blocks, scales = source.shape(name + _BLOCKS), source.shape(name + _SCALES)
            if len(blocks) != 4 or blocks[:3] != scales or blocks[3] != _GROUP // 2:
                raise WeightsError(f"{name} has blocks of {list(blocks)} and scales of {list(scales)}.")

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._source.shape(name)
        num_experts, num_rows, num_groups, _ = self._source.shape(name + _BLOCKS)
        return num_experts, num_groups * _GROUP, num_rows

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return torch.bfloat16 if name in self._packed else self._source.dtype(name)

    def tensor_bytes(self, name: str) -> int:
        if name not in self._packed:
            return self._source.tensor_bytes(name)
        return self._source.tensor_bytes(name + _BLOCKS) + self._source.tensor_bytes(name + _SCALES)

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Exact: every number of this format is one of bfloat16's. A cut through the inputs reads the whole matrix."""
        if name not in self._packed:
            return self._source.get_slice(name, axis, start, stop)
        if axis == 1:
            return self.get(name)[:, start:stop]
        cut = (axis // 2, start, stop)  # experts, or outputs
        blocks, scales = (self._source.get_slice(name + kind, *cut) for kind in (_BLOCKS, _SCALES))
        return _dequantized(blocks, scales)

    def file_entry(self, name: str) -> TensorEntry | None:
        return None if name in self._packed else self._source.file_entry(name)


def _dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 [E, R, G, 16] and [E, R, G] -> bfloat16 [E, 32 G, R]; an expert at a time, in float32."""
    import torch

    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
    num_experts, num_rows, num_groups, _ = blocks.shape
    result = torch.empty(num_experts, num_groups * _GROUP, num_rows, dtype=torch.bfloat16)
    for expert in range(num_experts):
        codes = torch.stack([blocks[expert] & 15, blocks[expert] >> 4], dim=-1).flatten(2)  # [R, G, 32]
        exponents = scales[expert].int().unsqueeze(-1) - _BIAS
        result[expert] = torch.ldexp(values[codes.long()], exponents).flatten(1).t()
    return result
