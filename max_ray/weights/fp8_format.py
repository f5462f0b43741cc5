"""FP8Format: X.weight float8 [N, K] beside X.weight_scale (or X.weight_scale_inv), of one number, [N, 1], or one for
each block of 128 x 128."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import TYPE_CHECKING

from max_ray.errors import WeightsError
from max_ray.weights.matrix_format import MatrixFormat, part

if TYPE_CHECKING:
    from max_ray.weights.quantized import QuantizedRows

SCALES = ("weight_scale", "weight_scale_inv")


class FP8Format(MatrixFormat):
    """See the head of this file."""

    codes_part = "weight"
    parts = SCALES

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def tensor_bytes(self, name: str) -> int:
        return self.source.tensor_bytes(name)

    def group(self, name: str) -> int:
        return self.scheme.group_size

    def packed_bits(self, name: str) -> float:
        return 8 + 32 / (self.scheme.group_size or self.shape(name)[1])

    def check(self, name: str) -> None:
        entry, scales = self.source.file_entry(name), self._scales(name)
        if entry is not None and entry.dtype != "F8_E4M3":
            raise WeightsError(f"{name} has scales and is in {entry.dtype}; of such matrices F8_E4M3 can be read.")
        found, block, (rows, columns) = self.source.shape(scales), self.scheme.group_size, self.shape(name)
        if block and (columns % block or found != (-(-rows // block), columns // block)):
            raise WeightsError(f"{scales} is {list(found)}, not one for each block of {block} x {block}.")
        if not block and math.prod(found) not in (1, rows):
            raise WeightsError(f"{scales} has {math.prod(found)} numbers, neither 1 nor one for each row.")

    def read(self, name: str, rows: range, columns: range) -> QuantizedRows:
        from max_ray.weights.quantized import QuantizedRows

        codes = self.source.get_slice(name, 0, rows.start, rows.stop)[:, columns.start : columns.stop]
        scales = self.source.get(self._scales(name)).float()
        block, num_rows = self.scheme.group_size, self.shape(name)[0]
        if not block:
            per_row = scales.reshape(-1, 1).expand(num_rows, 1)[rows.start : rows.stop]
            return QuantizedRows("fp8", len(columns), codes, per_row.contiguous())
        of_rows = scales.repeat_interleave(block, dim=0)[rows.start : rows.stop]
        cut = of_rows[:, columns.start // block : columns.stop // block]
        return QuantizedRows("fp8", block, codes, cut.contiguous())

    def _scales(self, name: str) -> str:
        found = scale_name(name, self.stored)
        assert found is not None, f"{name} has no scale"
        return found


def scale_name(name: str, names: Container[str]) -> str | None:
    """The tensor with the scales of an fp8 matrix; None for a name without."""
    if not name.endswith(".weight"):
        return None
    return next((n for kind in SCALES if (n := part(name, kind)) in names), None)
