"""MatrixFormat: how one quantization scheme stores a matrix; a subclass a layout of tensors. And what they share.

A matrix goes by the name of its plain weight, `X.weight`, [N, K]; the tensors that stand for it are `X.<part>`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from max_ray.errors import ParallelismError, WeightsError
from max_ray.weights.quantization_scheme import Scheme
from max_ray.weights.source import WeightSource

if TYPE_CHECKING:
    import torch

    from max_ray.weights.quantized import QuantizedRows

SMALLEST = 32
"""Columns of a group in memory, at least; of 8-bit integers, always."""
_SIZES = (128, 64)  # of larger ones, for rows of one scale: the first that so many ranks do not cut
_RANKS = 8


class MatrixFormat(ABC):
    """Reads the matrices of one scheme. stored: the checkpoint's names. keep_quantized: see QuantizedCheckpoint.

    codes_part: the part with the codes. parts: all parts, which are not tensors of their own.
    """

    codes_part: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def __init__(
        self, source: WeightSource, stored: Mapping[str, object], scheme: Scheme, *, keep_quantized: bool
    ) -> None:
        self.source = source
        self.stored = stored
        self.scheme = scheme
        self.keep_quantized = keep_quantized

    @abstractmethod
    def check(self, name: str) -> None:
        """Raises WeightsError where the shapes of a matrix's tensors do not agree with the scheme."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """(N, K)."""

    @abstractmethod
    def read(self, name: str, rows: range, columns: range) -> QuantizedRows:
        """A rectangle of a matrix."""

    @property
    def method(self) -> str:
        """How `WeightSource.quantization` calls it."""
        return self.scheme.method

    def tensor_bytes(self, name: str) -> int:
        """Bytes of the codes as stored."""
        return self.source.tensor_bytes(part(name, self.codes_part))

    def group(self, name: str) -> int:
        """Columns that share a scale, as far as tensor parallelism may not part them; 0 for none."""
        if self.scheme.group_size:
            return self.scheme.group_size
        whole = (s for s in _SIZES if self.scheme.bits == 4 and self.shape(name)[1] % (_RANKS * s) == 0)
        return next(whole, SMALLEST)

    def packed_bits(self, name: str) -> float:
        """Bits of memory that a weight takes once it is packed."""
        if self.scheme.bits == 8:
            return 8 + 16 / SMALLEST
        return 4 + (24 if self.has_zeros else 16) / self.group(name)

    @property
    def has_zeros(self) -> bool:
        """Whether each group of 4-bit codes has a zero of its own in memory."""
        return self.scheme.has_zeros

    def check_shapes(self, name: str, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises WeightsError where a part has another shape than `wanted` of it."""
        for kind, shape in wanted.items():
            found = self.source.shape(part(name, kind))
            if found != shape:
                size = self.scheme.group_size
                said = f"quantization_config's group_size {size}" if size else "what quantization_config says"
                raise WeightsError(
                    f"{part(name, kind)} is {list(found)}; with {said} it must be {list(shape)}. "
                    "Is config.json the checkpoint's own?"
                )

    def check_codes(self, name: str) -> None:
        """Raises WeightsError for codes that are no int32 matrix, or no whole groups of columns."""
        codes = part(name, self.codes_part)
        found, entry = self.source.shape(codes), self.source.file_entry(codes)
        if len(found) != 2 or (entry is not None and entry.dtype != "I32"):
            kind = "" if entry is None else f" in {entry.dtype}"
            raise WeightsError(f"{codes} is {list(found)}{kind}; what can be read: matrices, packed in I32.")
        num_columns, group = self.shape(name)[1], self.scheme.group_size or SMALLEST
        if num_columns % group:
            raise WeightsError(f"{codes} has {num_columns} columns, which are no whole groups of {group}.")

    def four_bits(
        self,
        name: str,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        columns: range,
        order: torch.Tensor | None,
    ) -> QuantizedRows:
        """codes, scales and zeros (or one zero for all) of whole rows."""
        from max_ray.weights.quantized import QuantizedRows

        group, num_columns = self.group(name), self.shape(name)[1]
        return QuantizedRows(
            "q4",
            group,
            codes[:, columns.start : columns.stop].contiguous(),
            self._kept(name, of_columns(scales, num_columns, group, columns)),
            zeros=zeros if zeros.ndim == 1 else of_columns(zeros, num_columns, group, columns),
            order=order,
        )

    def eight_bits(
        self, name: str, codes: torch.Tensor, scales: torch.Tensor, columns: range, order: torch.Tensor | None
    ) -> QuantizedRows:
        """uint8 codes, 128 more than the number, and scales of whole rows."""
        import torch

        from max_ray.weights.quantized import QuantizedRows

        numbers = (codes[:, columns.start : columns.stop].contiguous() ^ 128).view(torch.int8)
        kept = self._kept(name, of_columns(scales, self.shape(name)[1], SMALLEST, columns))
        return QuantizedRows("q8_0", SMALLEST, numbers, kept, order=order)

    def _kept(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        """Scales as they are in memory: float16. What is dequantized at once has them as exact as they are stored."""
        import torch

        kept = scales.to(torch.float16) if self.keep_quantized else scales.float()
        if torch.isinf(kept).any() and not torch.isinf(scales).any():
            raise WeightsError(
                f"{name} has scales up to {scales.abs().max().item():g}, and float16, in which they are kept, ends at "
                f"65504. Set --quantization-encoding to a plain one (bfloat16), which dequantizes it."
            )
        return kept

    def act_order(self, name: str, kind: str, columns: range, setting: str) -> torch.Tensor | None:
        """The columns in the order of their groups, which `kind` says; None where that is their own order, or where all
        columns are one group. setting: what the settings call it."""
        import torch

        index, num_columns, size = part(name, kind), self.shape(name)[1], self.scheme.group_size
        if not size or index not in self.stored:
            return None
        groups = self.source.get(index).long()
        if torch.equal(groups, torch.arange(num_columns) // size) or self._is_unset(groups):
            return None
        counts = torch.bincount(groups, minlength=1) if int(groups.min()) >= 0 else torch.zeros(1)
        if not bool((counts == size).all()):
            raise WeightsError(f"{index}: the groups of columns are not {size} wide each.")
        if len(columns) != num_columns:
            raise ParallelismError(
                f"{name} is in act-order ({setting}): its groups are spread over all columns, so "
                f"tensor parallelism cannot cut them. Set tensor_parallel_size=1, or take a checkpoint without."
            )
        return torch.argsort(groups, stable=True)

    def _is_unset(self, groups: torch.Tensor) -> bool:
        """Whether an order of columns was never filled in."""
        return False


def part(name: str, kind: str) -> str:
    """The tensor that is a part of a matrix."""
    return f"{name.removesuffix('.weight')}.{kind}"


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [a, b] -> [a, b, 32 / bits], lowest bits first."""
    import torch

    return packed.unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=torch.int32) & (1 << bits) - 1


def of_columns(groups: torch.Tensor, num_columns: int, size: int, columns: range) -> torch.Tensor:
    """[R, G], one for each of G equal groups of columns -> those of `columns`, one for each `size` of them."""
    spread = groups.repeat_interleave(num_columns // size // groups.shape[1], dim=1)
    return spread[:, columns.start // size : -(-columns.stop // size)].contiguous()
