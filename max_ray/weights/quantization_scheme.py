"""Schemes: what a checkpoint's `quantization_config` says about its matrices, layer by layer. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError

PLACE = "config.json: quantization_config"
_GROUP_SIZES = (32, 64, 128)
_GPTQ_PACKINGS = ("gptq", "gptq_v2")
_GPTQ_BITS = (4, 8)
_AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto_round:auto_awq": "awq"}
_AUTO_ROUND |= {"auto_round:awq": "awq"}
_FP8_OF_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_EVERY_LAYER = "Linear"
_PACKED = "pack-quantized"
_KINDS = f"8 bits, type float, and in format {_PACKED} 4 and 8 bits, type int"
_DONE_BEFOREHAND = ("weight_input", "weight_output")  # transforms that are in the weights already
_SPECIAL = frozenset("*+?^$()[]{}|\\")  # what makes a name a pattern for AutoRound

METHODS = ("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors", "gptq", "awq", "auto-round")
"""The values of `quant_method` that are read."""


@dataclass(frozen=True)
class Scheme:
    """method: "gptq", "awq", "fp8", or of compressed-tensors' format pack-quantized "int4" or "int8".

    group_size: columns that share a scale; of fp8 those of a block. 0: none, or of integers a scale for each row.
    zero_offset: what is added to a stored zero.
    has_zeros: of int4, whether zeros are stored; otherwise 8 is the code that means 0.
    bits: of a code, where it is an integer.
    """

    method: str
    group_size: int
    zero_offset: int = 0
    has_zeros: bool = False
    bits: int = 4


Rule = tuple["re.Pattern[str]", Scheme]


@dataclass(frozen=True)
class Schemes:
    """The scheme of each matrix that is quantized; which are, the tensors say.

    rules: the first whose pattern matches the beginning of a layer's name holds. default: where none does.
    """

    default: Scheme | None
    rules: tuple[Rule, ...] = ()

    @classmethod
    def read(cls, quantization: Mapping[str, Any], place: str = PLACE) -> Schemes:
        """From `quantization_config`. place: where that stands. Raises ConfigError for what is not read."""
        try:
            return _schemes(quantization)
        except _Unread as unread:
            raise ConfigError(f"{place} has {unread}.") from None

    def of(self, layer: str) -> Scheme | None:
        """The scheme of a layer, by its name without `.weight`."""
        return next((scheme for pattern, scheme in self.rules if pattern.match(layer)), self.default)

    def all(self) -> list[Scheme]:
        """Every scheme once, those of fewer bits first."""
        found = dict.fromkeys([*([] if self.default is None else [self.default]), *(s for _, s in self.rules)])
        return sorted(found, key=lambda scheme: 9 if scheme.method == "fp8" else scheme.bits)


class _Unread(Exception):
    """What the settings have, and what can be read in its place."""

    def __init__(self, key: str, value: object, readable: str) -> None:
        super().__init__(f"{key} {value!r}; what can be read: {readable}")


def _schemes(quantization: Mapping[str, Any]) -> Schemes:
    method = quantization.get("quant_method")
    if method in ("gptq", "awq"):
        return _of_layers(str(method), quantization)
    if method == "auto-round":
        return _of_auto_round(quantization)
    if method == "modelopt":
        _check_modelopt(quantization)
    if method in ("fp8", "fbgemm_fp8", "modelopt"):
        block = list(quantization.get("weight_block_size") or [])
        if block and block[0] != block[1]:
            raise _Unread("weight_block_size", block, "square blocks")
        return Schemes(Scheme("fp8", int(block[0]) if block else 0))
    if method == "compressed-tensors":
        return _of_compressed_tensors(quantization)
    raise _Unread(f"quant_method={method!r}, that is", method, ", ".join(METHODS))


def _check_modelopt(quantization: Mapping[str, Any]) -> None:
    """Raises _Unread for another algorithm than fp8, in any layer."""
    layers = _objects(quantization, "quantized_layers")
    algorithms = {str(layer.get("quant_algo")) for layer in layers.values()}
    if not algorithms or quantization.get("quant_algo") != "MIXED_PRECISION":
        algorithms |= {str(quantization.get("quant_algo"))}
    if unread := sorted(algorithms - set(_FP8_OF_MODELOPT)):
        raise _Unread("quant_algo", ", ".join(unread), " and ".join(_FP8_OF_MODELOPT))


def _of_layers(method: str, quantization: Mapping[str, Any]) -> Schemes:
    """GPTQ and AWQ. GPTQModel's `dynamic` has settings by pattern: "-:" for layers that are not quantized, "+:" or
    nothing before a pattern for others that differ."""
    default, rules = _of_integers(method, quantization), []
    for pattern, changes in _objects(quantization, "dynamic").items():
        if not pattern.startswith("-:"):
            scheme = _of_integers(method, {**quantization, **changes})
            rules.append((_compiled(pattern.removeprefix("+:")), scheme))
    return Schemes(default, tuple(rules))


def _of_auto_round(quantization: Mapping[str, Any]) -> Schemes:
    """AutoRound's own `extra_config` has settings by layer, or by a pattern that occurs in a layer's name; of 16 bits
    and more, a layer is not quantized."""
    packing = str(quantization.get("packing_format") or quantization.get("backend") or "")
    method = _AUTO_ROUND.get(":".join(packing.split(":")[:2]))
    if method is None:
        raise _Unread("packing_format", packing, ", ".join(_AUTO_ROUND))
    if (quantization.get("data_type") or "int") != "int":
        raise _Unread("data_type", quantization.get("data_type"), "int")
    if (quantization.get("act_bits") or 16) < 16:
        raise _Unread("act_bits", quantization.get("act_bits"), "unquantized activations (16)")
    exact, rules = [], []
    for name, changes in _objects(quantization, "extra_config").items():
        if (changes.get("bits") or 4) >= 16:
            continue
        scheme = _of_integers(method, {**quantization, **changes})
        exact.append((_compiled(f"{re.escape(name)}$"), scheme))
        if _SPECIAL & set(name):
            rules.append((_compiled(f".*(?:{name})"), scheme))
    return Schemes(_of_integers(method, quantization), (*exact, *rules))


def _of_integers(method: str, quantization: Mapping[str, Any]) -> Scheme:
    """GPTQ's and AWQ's numbers."""
    bits, size = quantization.get("bits"), quantization.get("group_size")
    readable = _GPTQ_BITS if method == "gptq" else (4,)
    if not isinstance(bits, int) or bits not in readable:
        raise _Unread("bits", bits, f"{' and '.join(map(str, readable))} bits")
    if not isinstance(size, int) or size not in (-1, *_GROUP_SIZES):
        raise _Unread("group_size", size, f"{_readable_sizes()}, and -1 for whole rows")
    if bits == 8 and quantization.get("sym") is False:
        raise _Unread("sym", False, "of 8 bits, symmetric weights")
    group_size = max(size, 0)
    if method == "awq":
        if str(quantization.get("version") or "gemm").lower() != "gemm":
            raise _Unread("version", quantization.get("version"), "version gemm")
        return Scheme("awq", group_size)
    packing = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if packing not in _GPTQ_PACKINGS:
        raise _Unread("checkpoint_format", packing, " and ".join(_GPTQ_PACKINGS))
    return Scheme("gptq", group_size, 1 if packing == "gptq" else 0, bits=bits)


def _of_compressed_tensors(quantization: Mapping[str, Any]) -> Schemes:
    """Numbers of activations and of the cache are not used, and what is ignored has plain tensors. Where groups have
    different numbers of weights, their targets say which layers they are for."""
    _check_transforms(quantization)
    groups: list[tuple[str, Mapping[str, Any], Scheme]] = []
    for name, group in (quantization.get("config_groups") or {}).items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights") or {}, Mapping):
            raise _Unread(f"config_groups: {name}", group, "an object with the weights' numbers")
        if group.get("weights"):
            groups.append((name, group, _of_group(group, quantization)))
    schemes = dict.fromkeys(scheme for _, _, scheme in groups)
    if len(schemes) < 2:
        return Schemes(next(iter(schemes), Scheme("fp8", 0)))
    return _by_target(groups)


def _by_target(groups: list[tuple[str, Mapping[str, Any], Scheme]]) -> Schemes:
    """A target is a layer's name, a pattern for its beginning ("re:"), or a class: names come first, classes last."""
    exact: list[Rule] = []
    patterns: list[Rule] = []
    classes: dict[Scheme, str] = {}
    for name, group, scheme in groups:
        for target in map(str, group.get("targets") or [_EVERY_LAYER]):
            if target.startswith("re:"):
                patterns.append((_compiled(target.removeprefix("re:")), scheme))
            elif "." in target:
                exact.append((_compiled(f"{re.escape(target)}$"), scheme))
            else:
                classes[scheme] = name
    if len(classes) > 1:
        raise _Unread("config_groups", list(classes.values()), "the same numbers of weights for all classes of layers")
    return Schemes(next(iter(classes), None), (*exact, *patterns))


def _of_group(group: Mapping[str, Any], quantization: Mapping[str, Any]) -> Scheme:
    weights = group["weights"]
    kind = (weights.get("num_bits"), weights.get("type"))
    if kind == (8, "float"):
        return _packed_floats(weights)
    if kind not in ((4, "int"), (8, "int")):
        raise _Unread("config_groups: weights", kind, _KINDS)
    stored = group.get("format") or quantization.get("format")
    if stored != _PACKED:
        raise _Unread("format", stored, f"of integers, {_PACKED}")
    return _packed_integers(weights)


def _packed_floats(weights: Mapping[str, Any]) -> Scheme:
    if weights.get("strategy") not in ("tensor", "channel", "block"):
        raise _Unread("config_groups: strategy", weights.get("strategy"), "tensor, channel and block")
    block = list(weights.get("block_structure") or []) if weights["strategy"] == "block" else [0, 0]
    if len(block) != 2 or block[0] != block[1]:
        raise _Unread("config_groups: block_structure", block, "square blocks")
    return Scheme("fp8", int(block[0]))


def _packed_integers(weights: Mapping[str, Any]) -> Scheme:
    bits, strategy, size = weights["num_bits"], weights.get("strategy"), weights.get("group_size")
    if strategy not in ("group", "channel"):
        raise _Unread("config_groups: strategy", strategy, "of integers, group and channel")
    if strategy == "group" and size not in _GROUP_SIZES:
        raise _Unread("config_groups: group_size", size, _readable_sizes())
    is_symmetric = weights.get("symmetric", True)
    if bits == 8 and not is_symmetric:
        raise _Unread("config_groups: symmetric", is_symmetric, "of 8 bits, symmetric ones")
    group_size = int(size or 0) if strategy == "group" else 0
    return Scheme(f"int{bits}", group_size, has_zeros=not is_symmetric, bits=bits)


def _check_transforms(quantization: Mapping[str, Any]) -> None:
    """Raises _Unread for rotations of activations: without them the weights mean something else."""
    schemes = (quantization.get("transform_config") or {}).get("config_groups") or {}
    for name, scheme in schemes.items():
        places = [applied.get("location") for applied in scheme.get("apply") or []]
        if unread := [place for place in places if place not in _DONE_BEFOREHAND]:
            raise _Unread(f"transform_config: {name}", unread, f"transforms at {' and '.join(_DONE_BEFOREHAND)}")


def _objects(quantization: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    """The settings by name that stand at `key`; none where it is not there. Raises _Unread for another kind."""
    values = quantization.get(key) or {}
    if not isinstance(values, Mapping) or not all(isinstance(value or {}, Mapping) for value in values.values()):
        raise _Unread(key, dict(values) if isinstance(values, Mapping) else values, "an object of objects")
    return {name: value or {} for name, value in values.items()}


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise _Unread("the pattern", pattern, f"regular expressions ({error})") from None


def _readable_sizes() -> str:
    return f"groups of {', '.join(map(str, _GROUP_SIZES))}"
