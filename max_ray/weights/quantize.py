"""Quantizes plain weights as they are loaded: `--quantization-encoding q4_k` on a bfloat16 checkpoint.

Rounding to the nearest code of a range that covers each group; no search for better scales, no calibration. llama.cpp's
quantizer weighs errors and is somewhat better at the same size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from max_ray.errors import ParallelismError
from max_ray.weights.finite import check_finite
from max_ray.weights.quantized import MIDDLE_OF_SIX_BITS, SUPER_GROUP, QuantizedRows
from max_ray.weights.safetensors_header import TensorEntry
from max_ray.weights.source import WeightSource

_TINY = 1e-20


class QuantizingSource(WeightSource):
    """A source of plain tensors whose matrices are offered quantized. Matrices that are no multiple of the encoding's
    group wide stay plain."""

    def __init__(self, source: WeightSource, encoding: str) -> None:
        self._source = source
        self._encoding = encoding

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self._source.get_slice(name, axis, start, stop)

    def file_entry(self, name: str) -> TensorEntry | None:
        return self._source.file_entry(name)

    def tensor_bytes(self, name: str) -> int:
        return self._source.tensor_bytes(name)

    def quantization(self, name: str) -> str:
        shape = self.shape(name)
        return self._encoding if len(shape) == 2 and shape[1] % GROUPS[self._encoding] == 0 else ""

    def check_columns(self, name: str, columns: range) -> None:
        group = GROUPS[self._encoding]
        if columns.start % group or columns.stop % group:
            raise ParallelismError(
                f"{self._encoding} quantizes {name} in groups of {group} columns, and tensor parallelism would cut "
                f"through one of its {self.shape(name)[1] // group}: choose another tensor_parallel_size or encoding."
            )

    def adds_nothing(self, name: str) -> bool:
        return self._source.adds_nothing(name)

    def get_quantized(self, name: str, rows: range, columns: range) -> QuantizedRows:
        self.check_columns(name, columns)
        data = self._source.get_slice(name, 0, rows.start, rows.stop)[:, columns.start : columns.stop]
        check_finite(name, data)
        return quantize(self._encoding, data.float())


def quantize(encoding: str, values: torch.Tensor) -> QuantizedRows:
    """values: float32 [R, K], K a multiple of GROUPS[encoding]."""
    return _QUANTIZE[encoding](values)


def _q4_k(values: torch.Tensor) -> QuantizedRows:
    return _with_minima("q4_k", values, 15)


def _q5_k(values: torch.Tensor) -> QuantizedRows:
    return _with_minima("q5_k", values, 31)


def _with_minima(kind: str, values: torch.Tensor, top: int) -> QuantizedRows:
    """Codes 0..top over the range of each group of 32."""
    groups = torch.unflatten(values, -1, (-1, 32))
    low = groups.amin(-1).clamp(max=0)
    super_scales, scales = _two_levels((groups.amax(-1) - low) / top, 63)
    super_mins, mins = _two_levels(-low, 63)
    rows = QuantizedRows(kind, 32, values, scales.byte(), mins.byte(), None, super_scales, super_mins)
    scale, offset = _spread(super_scales, 32) * scales, _spread(super_mins, 32) * mins
    codes = ((groups + offset.unsqueeze(-1)) / scale.clamp(min=_TINY).unsqueeze(-1)).round().clamp(0, top)
    return QuantizedRows(**{**vars(rows), "codes": codes.flatten(-2).byte()})


def _q6_k(values: torch.Tensor) -> QuantizedRows:
    groups = torch.unflatten(values, -1, (-1, 16))
    super_scales, scales = _two_levels(groups.abs().amax(-1) / 31, 127)
    scale = (_spread(super_scales, 16) * scales).clamp(min=_TINY).unsqueeze(-1)
    codes = (groups / scale).round().clamp(-MIDDLE_OF_SIX_BITS, 31) + MIDDLE_OF_SIX_BITS
    return QuantizedRows("q6_k", 16, codes.flatten(-2).byte(), scales.char(), super_scales=super_scales)


def _q8_0(values: torch.Tensor) -> QuantizedRows:
    groups = torch.unflatten(values, -1, (-1, 32))
    scales = (groups.abs().amax(-1) / 127).half()
    codes = (groups / scales.float().clamp(min=_TINY).unsqueeze(-1)).round().clamp(-127, 127)
    return QuantizedRows("q8_0", 32, codes.flatten(-2).char(), scales)


def _q4_0(values: torch.Tensor) -> QuantizedRows:
    groups = torch.unflatten(values, -1, (-1, 32))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # with its sign: it gets the code 0, -8 scales
    scales = (largest.squeeze(-1) / -8).half()
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales).float().unsqueeze(-1)
    codes = ((groups / divisor).round() + 8).clamp(0, 15)
    zeros = torch.tensor([8], dtype=torch.uint8)
    return QuantizedRows("q4", 32, codes.flatten(-2).byte(), scales, zeros=zeros)


def _q4_1(values: torch.Tensor) -> QuantizedRows:
    groups = torch.unflatten(values, -1, (-1, 32))
    mins = groups.amin(-1).half()
    scales = ((groups.amax(-1) - mins.float()) / 15).half()
    quotients = (groups - mins.float().unsqueeze(-1)) / scales.float().clamp(min=_TINY).unsqueeze(-1)
    return QuantizedRows("q4_1", 32, quotients.round().clamp(0, 15).flatten(-2).byte(), scales, mins=mins)


def _two_levels(wanted: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative [R, G] -> (float16 [R, super-groups], float whole numbers 0..top [R, G]) with that product."""
    per_super = SUPER_GROUP // 32 if top == 63 else SUPER_GROUP // 16
    supers = torch.unflatten(wanted, -1, (-1, per_super))
    scale = (supers.amax(-1) / top).half()
    counts = (supers / scale.float().clamp(min=_TINY).unsqueeze(-1)).round().clamp(0, top)
    return scale, counts.flatten(-2)


def _spread(per_super_group: torch.Tensor, group: int) -> torch.Tensor:
    return per_super_group.float().repeat_interleave(SUPER_GROUP // group, dim=-1)


GROUPS = {"q4_k": SUPER_GROUP, "q5_k": SUPER_GROUP, "q6_k": SUPER_GROUP, "q8_0": 32, "q4_0": 32, "q4_1": 32}
"""Encoding -> columns that share a scale: matrices are cut on these borders."""
_QUANTIZE: dict[str, Callable[[torch.Tensor], QuantizedRows]] = {
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
}
