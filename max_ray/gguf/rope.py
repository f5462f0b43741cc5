"""The rope of a GGUF model as the values of a config.json.

What llama.cpp does with the keys: positions are multiplied by 1 / rope.scaling.factor unless the type is none (without
a type it is linear), cos and sin by rope.scaling.attn_factor, and with yarn by 0.1 ln(factor) + 1 besides. Its
converter writes config.json's attention_factor as rope.scaling.yarn_attn_factor.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from max_ray.errors import WeightsError
from max_ray.gguf.file import GgufFile, GgufTensor
from max_ray.gguf.keys import Keys

_FACTORS = "rope_freqs.weight"
_LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768)
_YARN = ("attn_factor", "beta_fast", "beta_slow", "ext_factor", "log_multiplier")


def rope_values(file: GgufFile, keys: Keys, rotated: int, context: int) -> dict[str, Any]:
    """rope_theta and, where the rope is stretched, rope_scaling.

    rotated: width of a head that is turned, all of it. context: tokens, `context_length`. Raises WeightsError for a
    stretching that no rope here has.
    """
    theta = keys.positive("rope.freq_base", 10000.0)
    keys.must_be("rope.dimension_count", rotated)
    keys.must_be("rope.dimension_count_swa", rotated)
    kind = keys.get("rope.scaling.type") or "linear"
    factor = keys.positive("rope.scaling.factor", keys.positive("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise WeightsError(f"{file.path}: rope.scaling.type {kind!r} cannot be read; linear and yarn can.")
    if kind == "yarn":
        scaling = _yarn(keys, factor)
    elif _FACTORS in file.tensors:
        keys.must_be("rope.scaling.attn_factor", 1.0)
        if kind == "linear":
            keys.must_be("rope.scaling.factor", 1.0)
        scaling = _llama3_scaling(file.tensors[_FACTORS], theta, rotated)
    else:
        scaling = _linear(keys, 1.0 if kind == "none" else factor, context)
    if kind != "yarn":
        keys.ignore("rope.scaling.original_context_length", *(f"rope.scaling.yarn_{name}" for name in _YARN))
    return {"rope_theta": theta, **({"rope_scaling": scaling} if scaling else {})}


def _linear(keys: Keys, factor: float, context: int) -> dict[str, Any]:
    """Empty where nothing is stretched. A yarn that stretches nothing has the attention factor alone."""
    if factor != 1.0:
        keys.must_be("rope.scaling.attn_factor", 1.0)
        return {"rope_type": "linear", "factor": factor}
    times = keys.positive("rope.scaling.attn_factor", 1.0)
    if times == 1.0:
        return {}
    return {
        "rope_type": "yarn",
        "factor": 1.0,
        "attention_factor": times,
        "original_max_position_embeddings": context,
    }


def _yarn(keys: Keys, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    original = keys.count("rope.scaling.original_context_length", True)
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    for name in ("beta_fast", "beta_slow"):
        if keys.get(f"rope.scaling.yarn_{name}") is not None:
            scaling[name] = keys.positive(f"rope.scaling.yarn_{name}", 0.0)
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    given = keys.positive("rope.scaling.yarn_attn_factor", usual) * keys.positive("rope.scaling.attn_factor", 1.0)
    if given != usual:
        scaling["attention_factor"] = given
    return scaling


def _llama3_scaling(tensor: GgufTensor, theta: float, rotated: int) -> dict[str, Any]:
    """The scaling whose factors the file holds as a tensor: the parameters that give the same factors.

    Llama 3.1 divides inverse frequency i by 1 (short wavelengths), by `factor` (long ones), or by something between.
    The converter keeps the quotients alone, so the parameters are found by trying the published ones.
    """
    if tensor.type.name != "F32" or tensor.shape != (rotated // 2,):
        raise WeightsError(f"{tensor.path}: {tensor.name} must be {rotated // 2} F32 numbers.")
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        factors = struct.unpack(f"<{rotated // 2}f", file.read(tensor.nbytes))
    for original in _LLAMA3_CONTEXTS:
        wanted = [_llama3_factor(theta ** (2 * i / rotated), max(factors), original) for i in range(rotated // 2)]
        if all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, wanted, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": float(max(factors)),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise WeightsError(f"{tensor.path}: the factors in {tensor.name} are not those of a Llama 3 rope scaling.")


def _llama3_factor(inverse_of_frequency: float, factor: float, original: int) -> float:
    """By what transformers' `_compute_llama3_parameters` divides a frequency, low_freq_factor 1, high_freq_factor 4."""
    turns = original / (2 * math.pi * inverse_of_frequency)
    if turns > 4.0:
        return 1.0
    smooth = max(0.0, (turns - 1.0) / 3.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
