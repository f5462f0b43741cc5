"""QuantizedCheckpoint: GPTQ, AWQ, packed integer and FP8 checkpoints of Hugging Face, seen as quantized matrices.

How a matrix is stored is said by a MatrixFormat (`gptq_format`, `packed_format`, `fp8_format`); which scheme it has, by
the settings of the checkpoint (`quantization_scheme`); whether it is quantized at all, by its tensors. Layers may
differ.

Scales that more columns share than a group in memory has (8-bit integers: 32 columns) are repeated, which changes no
value. Scales of 4-bit and 8-bit integers are float16 in memory: exact for a bfloat16 one of 2^-17 or more, and off by
2^-25 at most below.

A scale of activations (X.input_scale) is not used: products are taken with unquantized activations; nor are those of
cached keys and values (k_scale and its kin), as the cache is not quantized. AutoGPTQ writes X.bias for layers without
one, all zeros: `adds_nothing`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING

from max_ray.errors import ParallelismError, WeightsError
from max_ray.weights.fp8_format import SCALES, FP8Format, scale_name
from max_ray.weights.gptq_format import AWQFormat, GPTQFormat
from max_ray.weights.matrix_format import MatrixFormat, part
from max_ray.weights.packed_format import PackedFormat
from max_ray.weights.quantization_scheme import Schemes
from max_ray.weights.source import WeightSource, no_such_tensor

if TYPE_CHECKING:
    import torch

    from max_ray.weights.quantized import QuantizedRows
    from max_ray.weights.safetensors_header import TensorEntry

_OF_ACTIVATIONS = (".input_scale", ".output_scale", ".activation_scale")
_OF_THE_CACHE = (".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".prob_scale", ".prob_output_scale")
_SHARED = ("qzeros", "scales", "g_idx", *SCALES)  # parts that are hidden whatever the scheme
_FORMATS: dict[str, type[MatrixFormat]] = {
    "gptq": GPTQFormat,
    "awq": AWQFormat,
    "int4": PackedFormat,
    "int8": PackedFormat,
    "fp8": FP8Format,
}


class QuantizedCheckpoint(WeightSource):
    """`keep_quantized`: offer codes and scales; otherwise `get_slice` dequantizes and nothing looks quantized."""

    def __init__(self, source: WeightSource, schemes: Schemes, *, keep_quantized: bool) -> None:
        self._source = source
        self._schemes = schemes
        self._keep_quantized = keep_quantized
        self._stored = dict.fromkeys(source.names())
        self._formats = {
            scheme: _FORMATS[scheme.method](source, self._stored, scheme, keep_quantized=keep_quantized)
            for scheme in schemes.all()
        }
        self._packed = self._matrices()
        hidden = (*_OF_ACTIVATIONS, *_OF_THE_CACHE, *(f".{p}" for p in _SHARED), *self._hidden_parts())
        plain = [n for n in self._stored if not n.endswith(hidden) and n not in self._packed]
        self._names = dict.fromkeys([*plain, *sorted(self._packed)])
        for name, matrix in self._packed.items():
            matrix.check(name)
        _check_scaled(source, plain)
        if any(isinstance(each, PackedFormat) for each in self._formats.values()):
            _check_packed(self._stored, self._packed)

    def _hidden_parts(self) -> set[str]:
        """Endings of the tensors that stand for matrices."""
        return {f".{p}" for each in self._formats.values() for p in each.parts}

    def _matrices(self) -> dict[str, MatrixFormat]:
        """The format of each quantized matrix. Raises WeightsError where its tensors are not of the scheme that the
        settings give it."""
        kinds = {each.codes_part for each in self._formats.values()}
        found: dict[str, MatrixFormat] = {}
        for kind in kinds - {"weight"}:
            for stored in self._stored:
                if stored.endswith(f".{kind}"):
                    name = f"{stored.removesuffix(f'.{kind}')}.weight"
                    found[name] = self._format_of(name, kind)
        if "weight" in kinds:
            for stored in self._stored:
                if scale_name(stored, self._stored) is not None:
                    found[stored] = self._format_of(stored, "weight")
        return found

    def _format_of(self, name: str, kind: str) -> MatrixFormat:
        scheme = self._schemes.of(name.removesuffix(".weight"))
        if scheme is None:
            raise WeightsError(f"{part(name, kind)} is quantized, and the settings have no group for it.")
        matrix = self._formats[scheme]
        if matrix.codes_part != kind:
            raise WeightsError(
                f"{part(name, kind)} is there, where the settings ask for {scheme.method} ({matrix.codes_part})."
            )
        return matrix

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packed[name].shape(name) if name in self._packed else self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return torch.float32 if name in self._packed else self._source.dtype(name)

    def tensor_bytes(self, name: str) -> int:
        return self._packed[name].tensor_bytes(name) if name in self._packed else self._source.tensor_bytes(name)

    def quantization(self, name: str) -> str:
        if name not in self._names:
            raise no_such_tensor(name, self._names)
        return self._packed[name].method if self._keep_quantized and name in self._packed else ""

    def adds_nothing(self, name: str) -> bool:
        if self._source.adds_nothing(name):
            return True
        is_bias = f"{name.removesuffix('.bias')}.weight" in self._packed and name.endswith(".bias")
        return is_bias and not bool(self._source.get(name).any())

    def packed_bits(self, name: str) -> float:
        return self._packed[name].packed_bits(name)

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
        group = self._packed[name].group(name) if name in self._packed else 0
        if group and (columns.start % group or (columns.stop % group and columns.stop != self.shape(name)[1])):
            raise ParallelismError(
                f"{name} has {self.shape(name)[1] // group} groups of {group} columns that share scales, and tensor "
                f"parallelism would cut through one: choose a tensor_parallel_size that divides their number."
            )

    def get_quantized(self, name: str, rows: range, columns: range) -> QuantizedRows:
        self.check_columns(name, columns)
        result = self._packed[name].read(name, rows, columns)
        if not result.has_finite_scales():
            raise WeightsError(f"Tensor {name!r} has scales that are no finite numbers.")
        return result


def _check_scaled(source: WeightSource, plain: Iterable[str]) -> None:
    """Raises WeightsError for float8 numbers that have no scale: they mean nothing without it."""
    for name in plain:
        entry = source.file_entry(name)
        if entry is not None and entry.dtype.startswith("F8_"):
            raise WeightsError(f"{name} is in {entry.dtype}, and the checkpoint has no {part(name, 'weight_scale')}.")


def _check_packed(stored: Mapping[str, object], packed: Container[str]) -> None:
    """Raises WeightsError for a scale without codes: its matrix would be taken for plain numbers."""
    for name in stored:
        if name.endswith(".weight_scale") and name.removesuffix("_scale") not in packed:
            raise WeightsError(
                f"{name} is there, but no {name.removesuffix('_scale')}_packed: it is quantized otherwise."
            )
