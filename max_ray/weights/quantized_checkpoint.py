"""QuantizedCheckpoint: GPTQ, AWQ and FP8 checkpoints of Hugging Face, seen as matrices that are quantized.

With a layer's matrix W [N, K], groups of G columns, and 8 codes of 4 bits in an int32 (lowest bits first):

| method | tensors beside `X` that stand for `X.weight`                                                              |
|--------|-----------------------------------------------------------------------------------------------------------|
| gptq   | X.qweight [K/8, N] packed along K; X.scales [K/G, N]; X.qzeros [K/G, N/8] along N, one less than the zero  |
|        | modulo 16 (gptq_v2: the zero); X.g_idx [K], the group of each column ("act-order" where it is not k // G)  |
| awq    | X.qweight [K, N/8] and X.qzeros [K/G, N/8] packed along N in the order 0 2 4 6 1 3 5 7; X.scales [K/G, N]  |
| fp8    | X.weight float8 [N, K]; X.weight_scale (or X.weight_scale_inv) of one number, [N, 1], or a 128 x 128 block |

A scale of activations (X.input_scale) is not used: products are taken with unquantized activations; nor are those of
cached keys and values (k_scale and its kin), as the cache is not quantized. AutoGPTQ writes X.bias for layers without
one, all zeros: `adds_nothing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from max_ray.errors import ConfigError, ParallelismError, WeightsError
from max_ray.weights.source import WeightSource, no_such_tensor

if TYPE_CHECKING:
    import torch

    from max_ray.weights.quantized import QuantizedRows
    from max_ray.weights.safetensors_header import TensorEntry

_SCALES = (".weight_scale", ".weight_scale_inv")
_OF_ACTIVATIONS = (".input_scale", ".output_scale", ".activation_scale")
_OF_THE_CACHE = (".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".prob_scale", ".prob_output_scale")
_HIDDEN = (".qzeros", ".scales", ".g_idx", *_SCALES, *_OF_ACTIVATIONS, *_OF_THE_CACHE)
_GROUP_SIZES = (32, 64, 128)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Scheme:
    """method: "gptq", "awq" or "fp8". group_size: columns that share a scale; of fp8 those of a block, or 0 for none.

    zero_offset: what is added to a stored zero.
    """

    method: str
    group_size: int
    zero_offset: int = 0

    @classmethod
    def of(cls, quantization: Mapping[str, Any]) -> Scheme:
        """From `quantization_config` of config.json. Raises ConfigError for what is not read."""
        method = str(quantization.get("quant_method"))
        if method in ("gptq", "awq"):
            return cls._of_four_bits(method, quantization)
        if method == "modelopt" and quantization.get("quant_algo") != "FP8":
            raise _unread("quant_algo", quantization.get("quant_algo"), "FP8")
        if method in ("fp8", "fbgemm_fp8", "modelopt"):
            block = list(quantization.get("weight_block_size") or [])
            if block and block[0] != block[1]:
                raise _unread("weight_block_size", block, "square blocks")
            return cls("fp8", int(block[0]) if block else 0)
        sizes = set()
        for name, group in (quantization.get("config_groups") or {}).items():
            if not isinstance(group, Mapping):
                raise _unread(f"config_groups: {name}", group, "an object with the weights' numbers")
            weights = group.get("weights") or {}
            kind = (weights.get("num_bits"), weights.get("type"))
            if kind != (8, "float"):
                raise _unread("config_groups: weights", kind, "8 bits, type float")
            if weights.get("strategy") not in ("tensor", "channel", "block"):
                raise _unread("config_groups: strategy", weights.get("strategy"), "tensor, channel and block")
            block = list(weights.get("block_structure") or []) if weights["strategy"] == "block" else [0, 0]
            if len(block) != 2 or block[0] != block[1]:
                raise _unread("config_groups: block_structure", block, "square blocks")
            sizes.add(int(block[0]))
        if len(sizes) > 1:
            raise _unread("config_groups: block_structure", sorted(sizes), "the same blocks for all layers")
        return cls("fp8", sizes.pop() if sizes else 0)

    @classmethod
    def _of_four_bits(cls, method: str, quantization: Mapping[str, Any]) -> Scheme:
        bits, size = quantization.get("bits"), quantization.get("group_size")
        if bits != 4:
            raise _unread("bits", bits, "4 bits")
        if size not in _GROUP_SIZES:
            raise _unread("group_size", size, f"groups of {', '.join(map(str, _GROUP_SIZES))}")
        if method == "awq" and str(quantization.get("version", "gemm")).lower() != "gemm":
            raise _unread("version", quantization.get("version"), "version gemm")
        version2 = quantization.get("checkpoint_format") == "gptq_v2"
        return cls(method, size, 1 if method == "gptq" and not version2 else 0)


class QuantizedCheckpoint(WeightSource):
    """`keep_quantized`: offer codes and scales; otherwise `get_slice` dequantizes and nothing looks quantized."""

    def __init__(self, source: WeightSource, scheme: Scheme, *, keep_quantized: bool) -> None:
        self._source = source
        self._scheme = scheme
        self._keep_quantized = keep_quantized
        stored = self._stored = dict.fromkeys(source.names())
        self._packed = {f"{n.removesuffix('.qweight')}.weight" for n in stored if n.endswith(".qweight")}
        if scheme.method == "fp8":
            self._packed |= {n for n in stored if _scale_name(n, stored) is not None}
        plain = [n for n in stored if not n.endswith((*_HIDDEN, ".qweight")) and n not in self._packed]
        self._names = dict.fromkeys([*plain, *sorted(self._packed)])
        for name in self._packed:
            self._check(name)
        if scheme.method == "fp8":
            _check_scaled(source, plain)

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed or self._scheme.method == "fp8":
            return self._source.shape(name)
        first, second = self._source.shape(_part(name, "qweight"))
        return (second * 8, first) if self._scheme.method == "awq" else (second, first * 8)

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return torch.float32 if name in self._packed else self._source.dtype(name)

    def tensor_bytes(self, name: str) -> int:
        stored = name if name not in self._packed or self._scheme.method == "fp8" else _part(name, "qweight")
        return self._source.tensor_bytes(stored)

    def quantization(self, name: str) -> str:
        if name not in self._names:
            raise no_such_tensor(name, self._names)
        return self._scheme.method if self._keep_quantized and name in self._packed else ""

    def adds_nothing(self, name: str) -> bool:
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
        num_rows, num_columns = self.shape(name)
        groups = num_columns // self._scheme.group_size
        for kind, wanted in (("scales", (groups, num_rows)), ("qzeros", (groups, num_rows // 8))):
            found = self._source.shape(_part(name, kind))
            if found != wanted:
                raise WeightsError(
                    f"{_part(name, kind)} is {list(found)}; with quantization_config's group_size "
                    f"{self._scheme.group_size} it must be {list(wanted)}. Is config.json the checkpoint's own?"
                )

    def packed_bits(self, name: str) -> float:
        group = self._scheme.group_size or self.shape(name)[1]
        return 8 + 32 / group if self._scheme.method == "fp8" else 4 + 24 / group

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
        group = self._scheme.group_size
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
        order = self._act_order(name, columns, codes.shape[1])
        if order is not None:
            codes = codes.index_select(1, order)
        return _four_bits(self._scheme.group_size, codes.to(torch.uint8), scales, zeros, columns, order)

    def _awq(self, name: str, rows: range, columns: range) -> QuantizedRows:
        import torch

        first, last = rows.start // 8, -(-rows.stop // 8)
        packed = self._source.get_slice(_part(name, "qweight"), 1, first, last)  # [K, n / 8]
        codes = _ordered(_nibbles(packed), _AWQ_ORDER)[:, rows.start - first * 8 : rows.stop - first * 8].t()
        scales = self._source.get_slice(_part(name, "scales"), 1, rows.start, rows.stop).t()
        zeros = self._zeros(name, rows, _AWQ_ORDER)
        return _four_bits(self._scheme.group_size, codes.to(torch.uint8), scales, zeros, columns, None)

    def _zeros(self, name: str, rows: range, order: range | tuple[int, ...]) -> torch.Tensor:
        """uint8 [R, K / G]."""
        import torch

        first, last = rows.start // 8, -(-rows.stop // 8)
        packed = self._source.get_slice(_part(name, "qzeros"), 1, first, last)
        zeros = _ordered(_nibbles(packed), order) + self._scheme.zero_offset & 15
        return zeros[:, rows.start - first * 8 : rows.stop - first * 8].t().to(torch.uint8)

    def _act_order(self, name: str, columns: range, num_columns: int) -> torch.Tensor | None:
        """The columns in the order of their groups; None where that is their own order."""
        import torch

        index = _part(name, "g_idx")
        if index not in self._stored:
            return None
        groups = self._source.get(index).long()
        if torch.equal(groups, torch.arange(num_columns) // self._scheme.group_size):
            return None
        counts = torch.bincount(groups, minlength=1) if int(groups.min()) >= 0 else torch.zeros(1)
        if not bool((counts == self._scheme.group_size).all()):
            raise WeightsError(f"{index}: the groups of columns are not {self._scheme.group_size} wide each.")
        if len(columns) != num_columns:
            raise ParallelismError(
                f"{name} is in act-order (desc_act): its groups are spread over all columns, so tensor parallelism "
                f"cannot cut them. Set tensor_parallel_size=1, or take a checkpoint without desc_act."
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


def _four_bits(
    group: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    columns: range,
    order: torch.Tensor | None,
) -> QuantizedRows:
    import torch

    from max_ray.weights.quantized import QuantizedRows

    groups = slice(columns.start // group, -(-columns.stop // group))
    return QuantizedRows(
        "q4",
        group,
        codes[:, columns.start : columns.stop].contiguous(),
        scales[:, groups].to(torch.float16).contiguous(),
        zeros=zeros[:, groups].contiguous(),
        order=order,
    )


def _unread(key: str, value: object, readable: str) -> ConfigError:
    return ConfigError(f"config.json: quantization_config has {key} {value!r}; what can be read: {readable}.")
