"""QuantizedCheckpoint: GPTQ, AWQ, packed integer and FP8 checkpoints of Hugging Face, seen as quantized matrices.

With a layer's matrix W [N, K], groups of G columns, and 8 codes of 4 bits in an int32 (lowest bits first):

| method | tensors beside `X` that stand for `X.weight`                                                              |
|--------|-----------------------------------------------------------------------------------------------------------|
| gptq   | X.qweight [K/8, N] packed along K; X.scales [K/G, N]; X.qzeros [K/G, N/8] along N, one less than the zero  |
|        | modulo 16 (gptq_v2: the zero); X.g_idx [K], the group of each column ("act-order" where it is not k // G)  |
| awq    | X.qweight [K, N/8] and X.qzeros [K/G, N/8] packed along N in the order 0 2 4 6 1 3 5 7; X.scales [K/G, N]  |
| int4   | X.weight_packed [N, K/8] along K; X.weight_scale [N, K/G], or [N, 1] for all columns; asymmetric ones have |
|        | X.weight_zero_point [N/8, K/G] along N; X.weight_shape, N and K; of actorder "group" X.weight_g_idx [K]    |
| int8   | the same with 4 codes of 8 bits in an int32, 128 more than the number; symmetric only                      |
| fp8    | X.weight float8 [N, K]; X.weight_scale (or X.weight_scale_inv) of one number, [N, 1], or a 128 x 128 block |

int4 and int8 are compressed-tensors' format "pack-quantized". Scales that more columns share than a group in memory
has (int8: 32 columns) are repeated, which changes no value. Scales of 4-bit and 8-bit integers are float16 in memory:
exact for a bfloat16 one of 2^-17 or more, and off by 2^-25 at most below.

A scale of activations (X.input_scale) is not used: products are taken with unquantized activations; nor are those of
cached keys and values (k_scale and its kin), as the cache is not quantized. AutoGPTQ writes X.bias for layers without
one, all zeros: `adds_nothing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING

from max_ray.errors import ParallelismError, WeightsError
from max_ray.weights.quantization_scheme import Scheme
from max_ray.weights.source import WeightSource, no_such_tensor

if TYPE_CHECKING:
    import torch

    from max_ray.weights.quantized import QuantizedRows
    from max_ray.weights.safetensors_header import TensorEntry

_SCALES = (".weight_scale", ".weight_scale_inv")
_OF_ACTIVATIONS = (".input_scale", ".output_scale", ".activation_scale")
_OF_THE_CACHE = (".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".prob_scale", ".prob_output_scale")
_HIDDEN = (".qzeros", ".scales", ".g_idx", *_SCALES, *_OF_ACTIVATIONS, *_OF_THE_CACHE)
_OF_INTEGERS = (".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
_BITS = {"int4": 4, "int8": 8}
_SMALLEST = 32  # columns of a group in memory
_SIZES = (128, 64)  # of larger ones, for rows of one scale: the first that so many ranks do not cut
_RANKS = 8
_ACT_ORDER = ("desc_act", 'actorder "group"')
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class QuantizedCheckpoint(WeightSource):
    """`keep_quantized`: offer codes and scales; otherwise `get_slice` dequantizes and nothing looks quantized."""

    def __init__(self, source: WeightSource, scheme: Scheme, *, keep_quantized: bool) -> None:
        self._source = source
        self._scheme = scheme
        self._keep_quantized = keep_quantized
        stored = self._stored = dict.fromkeys(source.names())
        self._bits = _BITS.get(scheme.method, 0)
        kind = ".weight_packed" if self._bits else ".qweight"
        self._packed = {f"{n.removesuffix(kind)}.weight" for n in stored if n.endswith(kind)}
        if scheme.method == "fp8":
            self._packed |= {n for n in stored if _scale_name(n, stored) is not None}
        hidden = (*_HIDDEN, kind, *(_OF_INTEGERS if self._bits else ()))
        plain = [n for n in stored if not n.endswith(hidden) and n not in self._packed]
        self._names = dict.fromkeys([*plain, *sorted(self._packed)])
        for name in self._packed:
            self._check(name)
        if scheme.method == "fp8":
            _check_scaled(source, plain)
        if self._bits:
            _check_packed(stored, self._packed)

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed or self._scheme.method == "fp8":
            return self._source.shape(name)
        if self._bits:
            num_rows, words = self._source.shape(_part(name, "weight_packed"))
            return num_rows, words * (32 // self._bits)
        first, second = self._source.shape(_part(name, "qweight"))
        return (second * 8, first) if self._scheme.method == "awq" else (second, first * 8)

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return torch.float32 if name in self._packed else self._source.dtype(name)

    def tensor_bytes(self, name: str) -> int:
        if name not in self._packed or self._scheme.method == "fp8":
            return self._source.tensor_bytes(name)
        return self._source.tensor_bytes(_part(name, "weight_packed" if self._bits else "qweight"))

    def quantization(self, name: str) -> str:
        if name not in self._names:
            raise no_such_tensor(name, self._names)
        return self._scheme.method if self._keep_quantized and name in self._packed else ""

    def adds_nothing(self, name: str) -> bool:
        if self._source.adds_nothing(name):
            return True
        is_bias = f"{name.removesuffix('.bias')}.weight" in self._packed and name.endswith(".bias")
        return is_bias and not bool(self._source.get(name).any())

    def _check(self, name: str) -> None:
        """Raises WeightsError where the shapes of a matrix's tensors do not agree with the group size."""
        if self._scheme.method == "fp8":
            scale_name = _scale_name(name, self._stored)
            assert scale_name is not None, f"{name} has no scale"
            entry = self._source.file_entry(name)
            if entry is not None and entry.dtype != "F8_E4M3":
                raise WeightsError(f"{name} has scales and is in {entry.dtype}; of such matrices F8_E4M3 can be read.")
            found, block, rows = self._source.shape(scale_name), self._scheme.group_size, self.shape(name)[0]
            if block and (self.shape(name)[1] % block or found != (-(-rows // block), self.shape(name)[1] // block)):
                raise WeightsError(f"{scale_name} is {list(found)}, not one for each block of {block} x {block}.")
            if not block and math.prod(found) not in (1, rows):
                raise WeightsError(f"{scale_name} has {math.prod(found)} numbers, neither 1 nor one for each row.")
            return
        if self._bits:
            self._check_integers(name)
            return
        num_rows, num_columns = self.shape(name)
        groups = num_columns // self._scheme.group_size
        for kind, wanted in (("scales", (groups, num_rows)), ("qzeros", (groups, num_rows // 8))):
            found = self._source.shape(_part(name, kind))
            if found != wanted:
                raise WeightsError(
                    f"{_part(name, kind)} is {list(found)}; with quantization_config's group_size "
                    f"{self._scheme.group_size} it must be {list(wanted)}. Is config.json the checkpoint's own?"
                )

    def _check_integers(self, name: str) -> None:
        packed, scale = _part(name, "weight_packed"), _part(name, "weight_scale")
        found = self._source.shape(packed)
        entry = self._source.file_entry(packed)
        if len(found) != 2 or (entry is not None and entry.dtype != "I32"):
            kind = "" if entry is None else f" in {entry.dtype}"
            raise WeightsError(f"{packed} is {list(found)}{kind}; what can be read: matrices, packed in I32.")
        num_rows, num_columns = self.shape(name)
        group = self._scheme.group_size
        if num_columns % (group or _SMALLEST):
            raise WeightsError(
                f"{packed} has {num_columns} columns, which are no whole groups of {group or _SMALLEST}."
            )
        wanted: dict[str, tuple[int, ...]] = {}
        wanted[scale] = (num_rows, num_columns // group if group else 1)
        zeros, index = _part(name, "weight_zero_point"), _part(name, "weight_g_idx")
        if self._scheme.has_zeros:
            wanted[zeros] = (-(-num_rows // 8), wanted[scale][1])
        elif zeros in self._stored:
            raise WeightsError(f"{zeros} is there, but quantization_config says that weights are symmetric.")
        if index in self._stored:
            wanted[index] = (num_columns,)
        for part, shape in wanted.items():
            if self._source.shape(part) != shape:
                raise WeightsError(
                    f"{part} is {list(self._source.shape(part))}; with what quantization_config says it must be "
                    f"{list(shape)}. Is config.json the checkpoint's own?"
                )

    def _group(self, name: str) -> int:
        """Columns that share a scale, as far as tensor parallelism may not part them; 0 for whole rows of fp8."""
        if self._scheme.group_size or not self._bits:
            return self._scheme.group_size
        whole = (s for s in _SIZES if self._bits == 4 and self.shape(name)[1] % (_RANKS * s) == 0)
        return next(whole, _SMALLEST)

    def packed_bits(self, name: str) -> float:
        if self._bits == 8:
            return 8 + 16 / _SMALLEST
        group = self._group(name) or self.shape(name)[1]
        if self._scheme.method == "fp8":
            return 8 + 32 / group
        return 4 + (16 if self._bits and not self._scheme.has_zeros else 24) / group

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        if name not in self._packed:
            return self._source.get_slice(name, axis, start, stop)
        num_rows, num_columns = self.shape(name)
        rows = range(start, stop) if axis == 0 else range(num_rows)
        values = self.get_quantized(name, rows, range(num_columns)).dequantize()
        return values if axis == 0 else values[:, start:stop]

    def file_entry(self, name: str) -> TensorEntry | None:
        return None if name in self._packed else self._source.file_entry(name)

    def check_columns(self, name: str, columns: range) -> None:
        group = self._group(name) if name in self._packed else 0
        if group and (columns.start % group or (columns.stop % group and columns.stop != self.shape(name)[1])):
            raise ParallelismError(
                f"{name} has {self.shape(name)[1] // group} groups of {group} columns that share scales, and tensor "
                f"parallelism would cut through one: choose a tensor_parallel_size that divides their number."
            )

    def get_quantized(self, name: str, rows: range, columns: range) -> QuantizedRows:
        self.check_columns(name, columns)
        read: dict[str, Callable[[str, range, range], QuantizedRows]] = {
            "gptq": self._gptq,
            "awq": self._awq,
            "int4": self._integers,
            "int8": self._integers,
            "fp8": self._fp8,
        }
        result = read[self._scheme.method](name, rows, columns)
        if not result.has_finite_scales():
            raise WeightsError(f"Tensor {name!r} has scales that are no finite numbers.")
        return result

    def _gptq(self, name: str, rows: range, columns: range) -> QuantizedRows:
        import torch

        packed = self._source.get_slice(_part(name, "qweight"), 1, rows.start, rows.stop)
        codes = _nibbles(packed).transpose(1, 2).flatten(0, 1).t()  # [N, K]
        scales = self._source.get_slice(_part(name, "scales"), 1, rows.start, rows.stop).t()
        zeros = self._zeros(name, rows, range(8))
        order = self._act_order(name, "g_idx", columns)
        if order is not None:
            codes = codes.index_select(1, order)
        return self._four_bits(name, codes.to(torch.uint8), scales, zeros, columns, order)

    def _awq(self, name: str, rows: range, columns: range) -> QuantizedRows:
        import torch

        first, last = rows.start // 8, -(-rows.stop // 8)
        packed = self._source.get_slice(_part(name, "qweight"), 1, first, last)  # [K, n / 8]
        codes = _ordered(_nibbles(packed), _AWQ_ORDER)[:, rows.start - first * 8 : rows.stop - first * 8].t()
        scales = self._source.get_slice(_part(name, "scales"), 1, rows.start, rows.stop).t()
        zeros = self._zeros(name, rows, _AWQ_ORDER)
        return self._four_bits(name, codes.to(torch.uint8), scales, zeros, columns, None)

    def _zeros(self, name: str, rows: range, order: range | tuple[int, ...]) -> torch.Tensor:
        """uint8 [R, K / G]."""
        import torch

        first, last = rows.start // 8, -(-rows.stop // 8)
        packed = self._source.get_slice(_part(name, "qzeros"), 1, first, last)
        zeros = _ordered(_nibbles(packed), order) + self._scheme.zero_offset & 15
        return zeros[:, rows.start - first * 8 : rows.stop - first * 8].t().to(torch.uint8)

    def _integers(self, name: str, rows: range, columns: range) -> QuantizedRows:
        import torch

        from max_ray.weights.quantized import QuantizedRows

        self._check_stored_shape(name)
        packed = self._source.get_slice(_part(name, "weight_packed"), 0, rows.start, rows.stop)
        codes = packed.contiguous().view(torch.uint8)  # lowest bits first
        if self._bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
        order = self._act_order(name, "weight_g_idx", columns) if self._scheme.group_size else None
        if order is not None:
            codes = codes.index_select(1, order)
        scales = self._source.get_slice(_part(name, "weight_scale"), 0, rows.start, rows.stop)
        if self._bits == 4:
            zeros = self._packed_zeros(name, rows) if self._scheme.has_zeros else torch.tensor([8], dtype=torch.uint8)
            return self._four_bits(name, codes, scales, zeros, columns, order)
        numbers = (codes[:, columns.start : columns.stop] ^ 128).view(torch.int8)
        kept = self._kept(name, _of_columns(scales, self.shape(name)[1], _SMALLEST, columns))
        return QuantizedRows("q8_0", _SMALLEST, numbers.contiguous(), kept, order=order)

    def _check_stored_shape(self, name: str) -> None:
        """Where K is no multiple of 8, the last int32 of a row is not full, which no shape in a header tells."""
        stored = _part(name, "weight_shape")
        if stored in self._stored and self._source.get(stored).tolist() != list(self.shape(name)):
            raise WeightsError(
                f"{stored} is {self._source.get(stored).tolist()}, and the tensors beside it make a matrix of "
                f"{list(self.shape(name))}."
            )

    def _packed_zeros(self, name: str, rows: range) -> torch.Tensor:
        """uint8 [R, K / G]."""
        import torch

        first, last = rows.start // 8, -(-rows.stop // 8)
        packed = self._source.get_slice(_part(name, "weight_zero_point"), 0, first, last)
        zeros = _nibbles(packed).transpose(1, 2).flatten(0, 1)
        return zeros[rows.start - first * 8 : rows.stop - first * 8].to(torch.uint8)

    def _four_bits(
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

        group, num_columns = self._group(name), self.shape(name)[1]
        return QuantizedRows(
            "q4",
            group,
            codes[:, columns.start : columns.stop].contiguous(),
            self._kept(name, _of_columns(scales, num_columns, group, columns)),
            zeros=zeros if zeros.ndim == 1 else _of_columns(zeros, num_columns, group, columns),
            order=order,
        )

    def _kept(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        """Scales as they are in memory: float16. What is dequantized at once has them as exact as they are stored."""
        import torch

        kept = scales.to(torch.float16) if self._keep_quantized else scales.float()
        if torch.isinf(kept).any() and not torch.isinf(scales).any():
            raise WeightsError(
                f"{name} has scales up to {scales.abs().max().item():g}, and float16, in which they are kept, ends at "
                f"65504. Set --quantization-encoding to a plain one (bfloat16), which dequantizes it."
            )
        return kept

    def _act_order(self, name: str, kind: str, columns: range) -> torch.Tensor | None:
        """The columns in the order of their groups; None where that is their own order."""
        import torch

        index, num_columns = _part(name, kind), self.shape(name)[1]
        if index not in self._stored:
            return None
        groups = self._source.get(index).long()
        if self._bits and bool((groups == -1).any()):  # never filled in
            return None
        if torch.equal(groups, torch.arange(num_columns) // self._scheme.group_size):
            return None
        counts = torch.bincount(groups, minlength=1) if int(groups.min()) >= 0 else torch.zeros(1)
        if not bool((counts == self._scheme.group_size).all()):
            raise WeightsError(f"{index}: the groups of columns are not {self._scheme.group_size} wide each.")
        if len(columns) != num_columns:
            raise ParallelismError(
                f"{name} is in act-order ({_ACT_ORDER[self._bits > 0]}): its groups are spread over all columns, so "
                f"tensor parallelism cannot cut them. Set tensor_parallel_size=1, or take a checkpoint without."
            )
        return torch.argsort(groups, stable=True)

    def _fp8(self, name: str, rows: range, columns: range) -> QuantizedRows:
        from max_ray.weights.quantized import QuantizedRows

        codes = self._source.get_slice(name, 0, rows.start, rows.stop)[:, columns.start : columns.stop]
        scale_name = _scale_name(name, self._stored)
        assert scale_name is not None, f"{name} has no scale"
        scales = self._source.get(scale_name).float()
        block, num_rows = self._scheme.group_size, self.shape(name)[0]
        if not block:
            per_row = scales.reshape(-1, 1).expand(num_rows, 1)[rows.start : rows.stop]
            return QuantizedRows("fp8", len(columns), codes, per_row.contiguous())
        of_rows = scales.repeat_interleave(block, dim=0)[rows.start : rows.stop]
        cut = of_rows[:, columns.start // block : columns.stop // block]
        return QuantizedRows("fp8", block, codes, cut.contiguous())


def _check_scaled(source: WeightSource, plain: Iterable[str]) -> None:
    """Raises WeightsError for float8 numbers that have no scale: they mean nothing without it."""
    for name in plain:
        entry = source.file_entry(name)
        if entry is not None and entry.dtype.startswith("F8_"):
            raise WeightsError(f"{name} is in {entry.dtype}, and the checkpoint has no {_part(name, 'weight_scale')}.")


def _check_packed(stored: Mapping[str, object], packed: Container[str]) -> None:
    """Raises WeightsError for a scale without codes: its matrix would be taken for plain numbers."""
    for name in stored:
        if name.endswith(".weight_scale") and name.removesuffix("_scale") not in packed:
            raise WeightsError(
                f"{name} is there, but no {name.removesuffix('_scale')}_packed: it is quantized otherwise."
            )


def _scale_name(name: str, names: Mapping[str, object]) -> str | None:
    """The tensor with the scales of an fp8 matrix."""
    if not name.endswith(".weight"):
        return None
    return next((n for kind in ("weight_scale", "weight_scale_inv") if (n := _part(name, kind)) in names), None)


def _part(name: str, kind: str) -> str:
    return f"{name.removesuffix('.weight')}.{kind}"


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int32 [a, b] -> [a, b, 8], lowest bits first."""
    import torch

    return packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32) & 15


def _ordered(nibbles: torch.Tensor, order: range | tuple[int, ...]) -> torch.Tensor:
    """[a, b, 8] with nibble i at column 8 b + order[i] -> [a, 8 b]."""
    return nibbles[..., [list(order).index(i) for i in range(8)]].flatten(1)


def _of_columns(groups: torch.Tensor, num_columns: int, size: int, columns: range) -> torch.Tensor:
    """[R, G], one for each of G equal groups of columns -> those of `columns`, one for each `size` of them."""
    spread = groups.repeat_interleave(num_columns // size // groups.shape[1], dim=1)
    return spread[:, columns.start // size : -(-columns.stop // size)].contiguous()
