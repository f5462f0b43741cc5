"""Scheme: what `quantization_config` of config.json says about the matrices of a quantized checkpoint. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError

_GROUP_SIZES = (32, 64, 128)
_PACKED = "pack-quantized"
_KINDS = f"8 bits, type float, and in format {_PACKED} 4 and 8 bits, type int"
_DONE_BEFOREHAND = ("weight_input", "weight_output")  # transforms that are in the weights already


@dataclass(frozen=True)
class Scheme:
    """method: "gptq", "awq", "fp8", or of compressed-tensors' format pack-quantized "int4" or "int8".

    group_size: columns that share a scale; of fp8 those of a block. 0: none, or of integers a scale for each row.
    zero_offset: what is added to a stored zero.
    has_zeros: of int4, whether zeros are stored; otherwise 8 is the code that means 0.
    """

    method: str
    group_size: int
    zero_offset: int = 0
    has_zeros: bool = False

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
        return cls._of_compressed_tensors(quantization)

    @classmethod
    def _of_compressed_tensors(cls, quantization: Mapping[str, Any]) -> Scheme:
        """Which layers have which group's numbers is not looked at: there is one kind of numbers, and the tensors say
        which layers have them. Those of activations and of the cache are not used."""
        _check_transforms(quantization)
        schemes: dict[Scheme, str] = {}
        for name, group in (quantization.get("config_groups") or {}).items():
            if not isinstance(group, Mapping) or not isinstance(group.get("weights") or {}, Mapping):
                raise _unread(f"config_groups: {name}", group, "an object with the weights' numbers")
            weights = group.get("weights")
            if not weights:
                continue
            kind = (weights.get("num_bits"), weights.get("type"))
            if kind == (8, "float"):
                schemes[cls._of_floats(weights)] = name
            elif kind in ((4, "int"), (8, "int")):
                stored = group.get("format") or quantization.get("format")
                if stored != _PACKED:
                    raise _unread("format", stored, f"of integers, {_PACKED}")
                schemes[cls._of_integers(weights)] = name
            else:
                raise _unread("config_groups: weights", kind, _KINDS)
        if len(schemes) > 1:
            raise _unread("config_groups", list(schemes.values()), "the same numbers of weights for all layers")
        return next(iter(schemes), cls("fp8", 0))

    @classmethod
    def _of_floats(cls, weights: Mapping[str, Any]) -> Scheme:
        if weights.get("strategy") not in ("tensor", "channel", "block"):
            raise _unread("config_groups: strategy", weights.get("strategy"), "tensor, channel and block")
        block = list(weights.get("block_structure") or []) if weights["strategy"] == "block" else [0, 0]
        if len(block) != 2 or block[0] != block[1]:
            raise _unread("config_groups: block_structure", block, "square blocks")
        return cls("fp8", int(block[0]))

    @classmethod
    def _of_integers(cls, weights: Mapping[str, Any]) -> Scheme:
        bits, strategy, size = weights["num_bits"], weights.get("strategy"), weights.get("group_size")
        if strategy not in ("group", "channel"):
            raise _unread("config_groups: strategy", strategy, "of integers, group and channel")
        if strategy == "group" and size not in _GROUP_SIZES:
            raise _unread("config_groups: group_size", size, _readable_sizes())
        is_symmetric = weights.get("symmetric", True)
        if bits == 8 and not is_symmetric:
            raise _unread("config_groups: symmetric", is_symmetric, "of 8 bits, symmetric ones")
        return cls(f"int{bits}", int(size or 0) if strategy == "group" else 0, has_zeros=not is_symmetric)

    @classmethod
    def _of_four_bits(cls, method: str, quantization: Mapping[str, Any]) -> Scheme:
        bits, size = quantization.get("bits"), quantization.get("group_size")
        if bits != 4:
            raise _unread("bits", bits, "4 bits")
        if size not in _GROUP_SIZES:
            raise _unread("group_size", size, _readable_sizes())
        if method == "awq" and str(quantization.get("version", "gemm")).lower() != "gemm":
            raise _unread("version", quantization.get("version"), "version gemm")
        version2 = quantization.get("checkpoint_format") == "gptq_v2"
        return cls(method, size, 1 if method == "gptq" and not version2 else 0)


def _check_transforms(quantization: Mapping[str, Any]) -> None:
    """Raises ConfigError for rotations of activations: without them the weights mean something else."""
    schemes = (quantization.get("transform_config") or {}).get("config_groups") or {}
    for name, scheme in schemes.items():
        places = [applied.get("location") for applied in scheme.get("apply") or []]
        if unread := [place for place in places if place not in _DONE_BEFOREHAND]:
            raise _unread(f"transform_config: {name}", unread, f"transforms at {' and '.join(_DONE_BEFOREHAND)}")


def _readable_sizes() -> str:
    return f"groups of {', '.join(map(str, _GROUP_SIZES))}"


def _unread(key: str, value: object, readable: str) -> ConfigError:
    return ConfigError(f"config.json: quantization_config has {key} {value!r}; what can be read: {readable}.")
