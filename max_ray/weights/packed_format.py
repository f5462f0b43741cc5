"""PackedFormat: compressed-tensors' format "pack-quantized".

With groups of G columns, and codes in an int32, lowest bits first:

int4: X.weight_packed [N, K/8] along K; X.weight_scale [N, K/G], or [N, 1] for all columns; asymmetric ones have
      X.weight_zero_point [N/8, K/G] along N; X.weight_shape, N and K; of actorder "group" X.weight_g_idx [K].
int8: the same with 4 codes of 8 bits in an int32, 128 more than the number; symmetric only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from max_ray.errors import WeightsError
from max_ray.weights.matrix_format import MatrixFormat, part, unpacked

if TYPE_CHECKING:
    import torch

    from max_ray.weights.quantized import QuantizedRows


class PackedFormat(MatrixFormat):
    """See the head of this file."""

    codes_part = "weight_packed"
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

    def shape(self, name: str) -> tuple[int, ...]:
        num_rows, words = self.source.shape(part(name, "weight_packed"))
        return num_rows, words * (32 // self.scheme.bits)

    def check(self, name: str) -> None:
        self.check_codes(name)
        num_rows, num_columns = self.shape(name)
        groups = num_columns // (self.scheme.group_size or num_columns)
        wanted: dict[str, tuple[int, ...]] = {"weight_scale": (num_rows, groups)}
        zeros = part(name, "weight_zero_point")
        if self.scheme.has_zeros:
            wanted["weight_zero_point"] = (-(-num_rows // 8), groups)
        elif zeros in self.stored:
            raise WeightsError(f"{zeros} is there, but quantization_config says that weights are symmetric.")
        if part(name, "weight_g_idx") in self.stored:
            wanted["weight_g_idx"] = (num_columns,)
        self.check_shapes(name, wanted)

    def read(self, name: str, rows: range, columns: range) -> QuantizedRows:
        import torch

        self._check_stored_shape(name)
        packed = self.source.get_slice(part(name, "weight_packed"), 0, rows.start, rows.stop)
        codes = packed.contiguous().view(torch.uint8)  # lowest bits first
        if self.scheme.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
        order = self.act_order(name, "weight_g_idx", columns, 'actorder "group"')
        if order is not None:
            codes = codes.index_select(1, order)
        scales = self.source.get_slice(part(name, "weight_scale"), 0, rows.start, rows.stop)
        if self.scheme.bits == 8:
            return self.eight_bits(name, codes, scales, columns, order)
        zeros = self._zeros(name, rows) if self.scheme.has_zeros else torch.tensor([8], dtype=torch.uint8)
        return self.four_bits(name, codes, scales, zeros, columns, order)

    def _check_stored_shape(self, name: str) -> None:
        """Where K is no multiple of 8, the last int32 of a row is not full, which no shape in a header tells."""
        stored = part(name, "weight_shape")
        if stored in self.stored and self.source.get(stored).tolist() != list(self.shape(name)):
            raise WeightsError(
                f"{stored} is {self.source.get(stored).tolist()}, and the tensors beside it make a matrix of "
                f"{list(self.shape(name))}."
            )

    def _zeros(self, name: str, rows: range) -> torch.Tensor:
        """uint8 [R, K / G]."""
        import torch

        first, last = rows.start // 8, -(-rows.stop // 8)
        packed = self.source.get_slice(part(name, "weight_zero_point"), 0, first, last)
        zeros = unpacked(packed, 4).transpose(1, 2).flatten(0, 1)
        return zeros[rows.start - first * 8 : rows.stop - first * 8].to(torch.uint8)

    def _is_unset(self, groups: torch.Tensor) -> bool:
        return bool((groups == -1).any())
