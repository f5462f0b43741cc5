"""PackedMatrix: quantized weights in memory, in the order in which a matrix product reads them.

A matrix [N, K] is held in *tiles* of 16 rows, and within a tile in *groups* of 32 columns, one after another, so that a
product streams it from the first byte to the last. N is padded to whole tiles with zeros; `rows` is the true N.
With row r of a tile and b in 0..3, column k of a group:

| codes of | shape                  | what a byte holds                                                               |
|----------|------------------------|---------------------------------------------------------------------------------|
| 4 bits   | [N/16, K/32, 4, 16, 4] | [t, g, i, r, b]: k = 4i + b in the low nibble, k = 16 + 4i + b in the high one   |
| 2 bits   | [N/16, K/32, 2, 16, 4] | [t, g, h, r, b]: bits 0-1 k = 8h + b, 2-3 k = 16 + 8h + b, 4-5 and 6-7 those + 4 |
| 1 bit    | [N/16, K/32, 16, 4]    | [t, g, r, b]: bit i k = 4i + b                                                  |
| 8 bits   | [N/16, K/32, 8, 16, 4] | [t, g, i, r, b]: k = 4i + b                                                     |
| scales   | [N/16, K/size, 16]     | [t, g, r]: of row r in group g of `size` columns                                 |

A 64-byte line of codes is thus 4 consecutive columns of 16 rows (twice, for nibbles): AVX-512's `vpdpbusd` multiplies
it with 4 broadcast activations and adds into 16 row sums, and one line of scales fits those 16 sums. Everything a file
says is kept as it is (Q4_K: 4.625 bits a weight for the file's 4.5, Q5_K: 5.625 for 5.5, the others: the file's),
so results are exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

TILE = 16
GROUP = 32
SUPER_GROUP = 256
_MIDDLE_OF_SIX_BITS = 32


@dataclass(frozen=True)
class PackedMatrix(ABC):
    """A quantized [rows, columns]; element = scale * code - offset, both given for groups of columns."""

    rows: int
    columns: int

    @abstractmethod
    def codes_of(self, tiles: slice | torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
        """Codes [n, lanes, K] of n tiles; all 16 lanes, or with `lanes` [n] one row of each tile: [n, K]."""

    @abstractmethod
    def scales_of(self, tiles: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 (scales, offsets) of n tiles, [n, K / group, 16]; offsets None where all are zero."""

    @property
    def num_tiles(self) -> int:
        return -(-self.rows // TILE)

    def dequantize(self, tiles: slice) -> torch.Tensor:
        """float32 [16 * number of tiles, K] of some tiles, padding rows included."""
        codes = self.codes_of(tiles, None)  # [n, 16, K]
        scales, offsets = self.scales_of(tiles)
        return _affine(codes, scales.transpose(1, 2), None if offsets is None else offsets.transpose(1, 2)).flatten(
            0, 1
        )

    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        """float32 [n, K]: the rows with these indices, int64 [n]."""
        tiles, lanes = indices // TILE, indices % TILE
        scales, offsets = self.scales_of(tiles)  # [n, G, 16]
        picked = [
            None if t is None else t[torch.arange(len(tiles), device=t.device), :, lanes] for t in (scales, offsets)
        ]
        assert picked[0] is not None
        return _affine(self.codes_of(tiles, lanes), picked[0], picked[1])


def stack(matrices: Sequence[PackedMatrix]) -> PackedMatrix | None:
    """The tiles of several matrices one after another, as a matrix whose `rows` are those of one: what a grouped
    product takes. None where they differ in kind, shape or groups, or in a number that stands for a tensor."""
    first = matrices[0]
    sizes = {(type(matrix), matrix.rows, matrix.columns) for matrix in matrices}
    layouts = {tuple((name, t.shape, t.dtype) for name, t in _tensors(matrix).items()) for matrix in matrices}
    if len(sizes) > 1 or len(layouts) > 1:
        return None
    columns = {name: [_tensors(matrix)[name] for matrix in matrices] for name in _tensors(first)}
    if any(t.ndim == 1 and not torch.equal(t, parts[0]) for parts in columns.values() for t in parts):
        return None
    tensors: dict[str, Any] = {n: ts[0] if ts[0].ndim == 1 else _joined(ts) for n, ts in columns.items()}
    return replace(first, **tensors)


def _tensors(matrix: PackedMatrix) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(matrix).items() if isinstance(value, torch.Tensor)}


def _joined(tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.view(torch.uint8) for t in tiles]).view(tiles[0].dtype)


def of_stack(stacked: PackedMatrix, index: int) -> PackedMatrix:
    """One matrix of a `stack`, in the same memory."""
    tiles = slice(index * stacked.num_tiles, (index + 1) * stacked.num_tiles)
    tensors: dict[str, Any] = {name: t[tiles] for name, t in _tensors(stacked).items() if t.ndim > 1}
    return replace(stacked, **tensors)


def _affine(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """codes [..., K], scales and offsets [..., G] -> float32 [..., K]."""
    groups = torch.unflatten(codes, -1, (scales.shape[-1], -1)).float() * scales.unsqueeze(-1)
    return (groups if offsets is None else groups - offsets.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class _ScalesAndMins(PackedMatrix):
    """scales, mins: uint8 (6 bits used) of groups of 32; super_scales, super_mins: float16 of groups of 256."""

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor
    super_scales: torch.Tensor
    super_mins: torch.Tensor

    def codes_of(self, tiles: slice | torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
        return _unpack_nibbles(self.codes, tiles, lanes)

    def scales_of(self, tiles: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        per_super = SUPER_GROUP // GROUP
        scales = self.scales[tiles].float() * _spread(self.super_scales[tiles], per_super)
        return scales, self.mins[tiles].float() * _spread(self.super_mins[tiles], per_super)


@dataclass(frozen=True)
class PackedQ4K(_ScalesAndMins):
    """codes 0..15."""


@dataclass(frozen=True)
class PackedQ5K(_ScalesAndMins):
    """codes 0..31, low 4 bits and the fifth apart."""

    high_codes: torch.Tensor

    def codes_of(self, tiles: slice | torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
        high = _pick(self.high_codes.unsqueeze(2), tiles, lanes)  # [n, G, 1, (16,) 4]
        places = torch.arange(8, dtype=torch.uint8, device=high.device)
        bits = high >> places.view(8, *(1,) * (high.ndim - 3)) & 1  # [n, G, 8, (16,) 4]
        return super().codes_of(tiles, lanes) | _in_order_of_columns(bits, lanes) << 4


@dataclass(frozen=True)
class PackedQ6K(PackedMatrix):
    """codes 0..63, value 32 less, low 4 and high 2 bits apart. scales: int8 of groups of 16; super_scales as in Q4K."""

    codes: torch.Tensor
    high_codes: torch.Tensor
    scales: torch.Tensor
    super_scales: torch.Tensor

    def codes_of(self, tiles: slice | torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
        high = _pick(self.high_codes, tiles, lanes)  # [n, G, 2, (16,) 4]
        fields = torch.stack([high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6], dim=-1)
        fields = torch.unflatten(fields, -1, (2, 2))  # [..., which i of the pair, half]
        order = (0, 1, 5, 2, 4, 3) if lanes is not None else (0, 3, 1, 6, 2, 5, 4)
        bits = fields.permute(order).flatten(1 if lanes is not None else 2)
        return _unpack_nibbles(self.codes, tiles, lanes) | bits << 4

    def scales_of(self, tiles: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        scales = self.scales[tiles].float() * _spread(self.super_scales[tiles], SUPER_GROUP // 16)
        return scales, scales * _MIDDLE_OF_SIX_BITS


@dataclass(frozen=True)
class PackedQ8(PackedMatrix):
    """codes: int8; scales: float16 of groups of 32."""

    codes: torch.Tensor
    scales: torch.Tensor

    def codes_of(self, tiles: slice | torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
        return _in_order_of_columns(_pick(self.codes, tiles, lanes), lanes)

    def scales_of(self, tiles: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.scales[tiles].float(), None


@dataclass(frozen=True)
class PackedQ4(PackedMatrix):
    """scales: float16 of groups of 32, 64, 128, ...; zeros: the code that means 0, uint8 of the same groups, or [1].

    Q4_0, GPTQ and AWQ.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def codes_of(self, tiles: slice | torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
        return _unpack_nibbles(self.codes, tiles, lanes)

    def scales_of(self, tiles: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        scales = self.scales[tiles].float()
        zeros = self.zeros if self.zeros.numel() == 1 else self.zeros[tiles]
        return scales, scales * zeros.float()


@dataclass(frozen=True)
class PackedQ4_1(PackedMatrix):
    """codes 0..15; scales, mins: float16 of groups of 32; element = scale * code + min."""

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor

    def codes_of(self, tiles: slice | torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
        return _unpack_nibbles(self.codes, tiles, lanes)

    def scales_of(self, tiles: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.scales[tiles].float(), -self.mins[tiles].float()


@dataclass(frozen=True)
class PackedFP8(PackedMatrix):
    """codes: float8_e4m3fn [N/16, 16, K], rows as they are. scales: float32 of groups of any size, up to whole rows."""

    codes: torch.Tensor
    scales: torch.Tensor

    def codes_of(self, tiles: slice | torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
        raw = self.codes.view(torch.uint8)  # float8 tensors cannot be indexed by tensors
        picked = raw[tiles] if lanes is None else raw[tiles, lanes]
        return picked.view(torch.float8_e4m3fn)

    def scales_of(self, tiles: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.scales[tiles], None


def _pick(codes: torch.Tensor, tiles: slice | torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
    return codes[tiles] if lanes is None else codes[tiles, :, :, lanes]


def _in_order_of_columns(codes: torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
    """[n, G, 8, (16,) 4] -> [n, (16,) K]."""
    return codes.flatten(1) if lanes is not None else codes.permute(0, 3, 1, 2, 4).flatten(2)


def _unpack_nibbles(codes: torch.Tensor, tiles: slice | torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
    picked = _pick(codes, tiles, lanes)  # [n, G, 4, (16,) 4]
    halves = torch.stack([picked & 15, picked >> 4], dim=2)  # [n, G, 2, 4, (16,) 4]
    return halves.flatten(1) if lanes is not None else halves.permute(0, 4, 1, 2, 3, 5).flatten(2)


def _spread(per_super_group: torch.Tensor, times: int) -> torch.Tensor:
    return per_super_group.float().repeat_interleave(times, dim=1)


def tile_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [16 n, K] of 0..15 -> [n, K/32, 4, 16, 4]."""
    split = torch.unflatten(_words(codes), 2, (-1, 2, 4))  # [n, r, g, half, i]
    return _lines(split[:, :, :, 0] | split[:, :, :, 1] << 4, codes.dtype)


def tile_pairs(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [16 n, K] of 0..3 -> [n, K/32, 2, 16, 4]."""
    split = torch.unflatten(_words(codes), 2, (-1, 2, 2, 2))  # [n, r, g, half, h, i of the pair]
    low, high = split[:, :, :, 0], split[:, :, :, 1]
    return _lines(low[..., 0] | high[..., 0] << 2 | low[..., 1] << 4 | high[..., 1] << 6, codes.dtype)


def tile_bits(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [16 n, K] of 0 and 1 -> [n, K/32, 16, 4]."""
    split = torch.unflatten(_words(codes), 2, (-1, 8))  # [n, r, g, i]
    places = torch.arange(8, dtype=torch.int32, device=codes.device)
    return _lines((split << places).sum(-1, keepdim=True, dtype=torch.int32), codes.dtype).squeeze(2)


def tile_bytes(codes: torch.Tensor) -> torch.Tensor:
    """int8 [16 n, K] -> [n, K/32, 8, 16, 4]."""
    return _lines(torch.unflatten(_words(codes), 2, (-1, 8)), codes.dtype)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """One-byte [16 n, K] -> int32 [n, 16, K / 4]: four codes at a time; shifts keep within their bytes."""
    return _tiles(codes.contiguous().view(torch.int32))


def _lines(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int32 [n, r, g, i] -> bytes [n, g, i, r, 4]."""
    return words.permute(0, 2, 3, 1).contiguous().unsqueeze(-1).view(dtype)


def tile_scales(scales: torch.Tensor) -> torch.Tensor:
    """[16 n, G] -> [n, G, 16]."""
    return _tiles(scales).transpose(1, 2).contiguous()


def _tiles(data: torch.Tensor) -> torch.Tensor:
    """[16 n, ...] -> [n, 16, ...]."""
    return torch.unflatten(data, 0, (-1, TILE))
