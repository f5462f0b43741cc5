"""GPTQFormat and AWQFormat: the layouts of AutoGPTQ (and GPTQModel, AutoRound) and AutoAWQ.

With groups of G columns (one of all columns where the settings say -1), and C = 32 / bits codes in an int32, lowest
bits first:

gptq: X.qweight [K/C, N] packed along K; X.scales [K/G, N]; X.qzeros [K/G, N/C] along N, one less than the zero modulo
      2^bits (gptq_v2: the zero); X.g_idx [K], the group of each column ("act-order" where it is not k // G).
awq:  X.qweight [K, N/8] and X.qzeros [K/G, N/8] packed along N in the order 0 2 4 6 1 3 5 7; X.scales [K/G, N].

Of 8 bits, symmetric ones: their zeros are all 128.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from max_ray.errors import WeightsError
from max_ray.weights.matrix_format import MatrixFormat, part, unpacked

if TYPE_CHECKING:
    import torch

    from max_ray.weights.quantized import QuantizedRows

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_MIDDLE = 128


class GPTQFormat(MatrixFormat):
    """See the head of this file."""

    codes_part = "qweight"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def has_zeros(self) -> bool:
        return True

    @property
    def _codes_a_word(self) -> int:
        return 32 // self.scheme.bits

    def shape(self, name: str) -> tuple[int, ...]:
        words, num_rows = self.source.shape(part(name, "qweight"))
        return num_rows, words * self._codes_a_word

    def check(self, name: str) -> None:
        self.check_codes(name)
        num_rows, num_columns = self.shape(name)
        groups = num_columns // (self.scheme.group_size or num_columns)
        self.check_shapes(name, {"scales": (groups, num_rows), "qzeros": (groups, num_rows // self._codes_a_word)})

    def read(self, name: str, rows: range, columns: range) -> QuantizedRows:
        import torch

        packed = self.source.get_slice(part(name, "qweight"), 1, rows.start, rows.stop)
        codes = unpacked(packed, self.scheme.bits).transpose(1, 2).flatten(0, 1).t().to(torch.uint8)  # [N, K]
        zeros = self._zeros(name, rows)
        order = self.act_order(name, "g_idx", columns, "desc_act")
        if order is not None:
            codes = codes.index_select(1, order)
        if self.scheme.bits == 4:
            return self.four_bits(name, codes, self._scales(name, rows), zeros, columns, order)
        if not bool((zeros == _MIDDLE).all()):
            raise WeightsError(
                f"{part(name, 'qzeros')} has zeros other than {_MIDDLE}; of 8 bits, symmetric weights can be read."
            )
        return self.eight_bits(name, codes, self._scales(name, rows), columns, order)

    def _scales(self, name: str, rows: range) -> torch.Tensor:
        """[R, K / G]."""
        return self.source.get_slice(part(name, "scales"), 1, rows.start, rows.stop).t()

    def _zeros(self, name: str, rows: range) -> torch.Tensor:
        """uint8 [R, K / G]."""
        import torch

        each = self._codes_a_word
        first, last = rows.start // each, -(-rows.stop // each)
        packed = self.source.get_slice(part(name, "qzeros"), 1, first, last)
        stored = self._in_order(unpacked(packed, self.scheme.bits))
        zeros = stored + self.scheme.zero_offset & (1 << self.scheme.bits) - 1
        return zeros[:, rows.start - first * each : rows.stop - first * each].t().to(torch.uint8)

    def _in_order(self, codes: torch.Tensor) -> torch.Tensor:
        """[a, b, C] as they lie in a word -> [a, C b] as columns lie."""
        return codes.flatten(1)


class AWQFormat(GPTQFormat):
    """See the head of this file."""

    def shape(self, name: str) -> tuple[int, ...]:
        num_columns, words = self.source.shape(part(name, "qweight"))
        return words * self._codes_a_word, num_columns

    def read(self, name: str, rows: range, columns: range) -> QuantizedRows:
        import torch

        first, last = rows.start // 8, -(-rows.stop // 8)
        packed = self.source.get_slice(part(name, "qweight"), 1, first, last)  # [K, n / 8]
        codes = self._in_order(unpacked(packed, 4))[:, rows.start - first * 8 : rows.stop - first * 8].t()
        scales, zeros = self._scales(name, rows), self._zeros(name, rows)
        return self.four_bits(name, codes.to(torch.uint8), scales, zeros, columns, None)

    def _in_order(self, codes: torch.Tensor) -> torch.Tensor:
        return codes[..., [_AWQ_ORDER.index(i) for i in range(8)]].flatten(1)
