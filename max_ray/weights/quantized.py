"""QuantizedRows: a rectangle of a quantized matrix taken apart into codes and scales, row by row.

What every kind means, for element k of a row (group g = k // group_size, super-group s = k // 256):

| kind | codes       | value                                                             | groups of            |
|------|-------------|-------------------------------------------------------------------|----------------------|
| q4_k | 0..15       | super_scales[s] * scales[g] * code - super_mins[s] * mins[g]      | 32, in super-groups  |
| q5_k | 0..31       | the same                                                          | the same              |
| q6_k | 0..63       | super_scales[s] * scales[g] * (code - 32)                         | 16, in super-groups  |
| q8_0 | -128..127   | scales[g] * code                                                  | 32                   |
| q4_1 | 0..15       | scales[g] * code + mins[g]                                        | 32                   |
| q4   | 0..15       | scales[g] * (code - zeros[g])                                     | 32, 64, 128, ...     |
| fp8  | float8 e4m3 | scales[g] * code                                                  | any; one for all, too |

Products are taken in float32. GGUF's blocks are described where they are unpacked (`gguf_blocks`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUPER_GROUP = 256
MIDDLE_OF_SIX_BITS = 32


@dataclass(frozen=True)
class QuantizedRows:
    """R rows of K elements; a field that the kind does not have is None.

    codes: [R, K], uint8 (q4_k, q5_k, q6_k, q4_1, q4), int8 (q8_0) or float8_e4m3fn (fp8).
    scales, mins: [R, K / group_size]; uint8 or int8 below super-scales, float16 or float32 otherwise.
    zeros: uint8 [R, K / group_size], or [1] for all.
    super_scales, super_mins: float16 [R, K / 256].
    order: int64 [K] where columns were brought into the order of their groups: column k here is order[k] of the matrix.
    """

    kind: str
    group_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    super_scales: torch.Tensor | None = None
    super_mins: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """float32 [R, K]: the definition that kernels are held against."""
        codes = torch.unflatten(self.codes.float(), -1, (-1, self.group_size))  # [R, G, group]
        scales = self.scales.float()
        if self.super_scales is not None:
            scales = scales * self._spread(self.super_scales)
        if self.kind == "q6_k":
            codes = codes - MIDDLE_OF_SIX_BITS
        if self.zeros is not None:
            codes = codes - self.zeros.float().unsqueeze(-1)
        values = codes * scales.unsqueeze(-1)
        if self.mins is not None and self.super_mins is not None:
            values = values - (self.mins.float() * self._spread(self.super_mins)).unsqueeze(-1)
        elif self.mins is not None:
            values = values + self.mins.float().unsqueeze(-1)
        result = values.flatten(-2)
        return result if self.order is None else torch.empty_like(result).index_copy_(-1, self.order, result)

    def has_finite_scales(self) -> bool:
        tensors = (self.scales, self.mins, self.super_scales, self.super_mins)
        return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None and t.is_floating_point())

    def _spread(self, per_super_group: torch.Tensor) -> torch.Tensor:
        """[R, K / 256] -> float32 [R, K / group_size]."""
        return per_super_group.float().repeat_interleave(SUPER_GROUP // self.group_size, dim=-1)
