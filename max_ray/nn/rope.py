"""Rotary position embedding (Su et al. 2021) and the ways in which checkpoints stretch it to longer texts.

Legend: R rotated width of a head, P = R / 2 pairs, T new tokens. Pair i at position p is turned by p * inv_freq[i],
with inv_freq[i] = theta ** (-2i / R) before scaling. Scaling by `rope_type`, as Hugging Face transformers defines it:

    default  none
    linear   inv_freq / factor
    llama3   low frequencies divided by factor, high ones kept, a linear blend between (Llama 3.1)
    yarn     the same idea with a ramp over pairs, and an attention factor on cos and sin (Peng et al. 2023)
    dynamic  theta grows with the length of the sequence, once that exceeds max_position_embeddings (NTK)
    longrope each frequency divided by a factor of its own, of one list up to the length of the pre-training
             (original_max_position_embeddings) and of another beyond it, and an attention factor (Ding et al. 2024)

`dynamic` and `longrope` in a server: Hugging Face takes the frequencies from the longest position seen in the whole
batch, so a result there depends on the neighbours. Here they depend on the request alone: a token of the prompt uses
the length of its whole prompt, a generated token the length up to itself. That is what Hugging Face gives for one
request alone, and it does not change with batching, chunking or preemption. (Prompts longer than `fixed_length` that
share a cached prefix but differ in length would rotate that prefix differently: reuse is exact up to there only.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from max_ray import kernels
from max_ray.driver import DeviceLike, as_torch_device
from max_ray.errors import ConfigError
from max_ray.nn.module import Module

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
_WITH_ORIGINAL = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """Rope of one model. `dim` is R; `scaling` holds the numbers of the scaling type, under Hugging Face's names."""

    dim: int
    theta: float
    max_position_embeddings: int
    rope_type: str = "default"
    scaling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rope_type not in _REQUIRED:
            raise ConfigError(
                f"config.json asks for rope_type {self.rope_type!r}; supported are {', '.join(sorted(_REQUIRED))}."
            )
        missing = [key for key in _REQUIRED[self.rope_type] if self.scaling.get(key) is None]
        if missing:
            raise ConfigError(f"config.json: rope_parameters of type {self.rope_type!r} lack {', '.join(missing)}.")
        if self.dim < 2 or self.dim % 2 or (self.rope_type == "dynamic" and self.dim == 2):
            raise ConfigError(f"config.json: {self.rope_type} rope cannot rotate heads of size {self.dim}.")
        for name in ("short_factor", "long_factor") if self.rope_type == "longrope" else ():
            if len(self.scaling[name]) != self.dim // 2:
                raise ConfigError(
                    f"config.json: {name} must have {self.dim // 2} numbers, one for each pair of a head."
                )

    @classmethod
    def from_huggingface(cls, config: Any, head_dim: int, default_theta: float = 10_000.0) -> RopeConfig:
        """From config.json as an attribute-style mapping: `rope_parameters` (transformers 5), or `rope_scaling` and
        `rope_theta` (before). Raises ConfigError for a type or a value that cannot work."""
        scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or default_theta
        partial = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
        old_type = scaling.pop("type", None)
        rope_type = scaling.pop("rope_type", None) or old_type or "default"
        max_positions = int(config.get("max_position_embeddings") or 2048)
        if rope_type in _WITH_ORIGINAL:
            outside = config.get("original_max_position_embeddings")
            inside = scaling.get("original_max_position_embeddings")
            scaling["original_max_position_embeddings"] = outside or inside or max_positions
        return cls(int(head_dim * partial), float(theta), max_positions, rope_type, scaling)

    @classmethod
    def of_whole_heads(cls, config: Any, head_dim: int, default_theta: float = 10_000.0) -> RopeConfig:
        """The same for a family that turns whole heads, as transformers does it there. Raises ConfigError for
        config.json's `partial_rotary_factor`, too, unless it is 1."""
        nested = config.get("rope_scaling") or config.get("rope_parameters") or {}
        for partial in (nested.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
            if partial is not None and partial != 1.0:
                raise ConfigError(
                    f"config.json: partial_rotary_factor={partial!r}, but the heads of this family are turned whole."
                )
        return cls.from_huggingface(config, head_dim, default_theta)

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on the length of its sequence."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def fixed_length(self) -> int:
        """Of a rope that depends on the length: tokens up to which it does not."""
        original = self.scaling.get("original_max_position_embeddings") if self.rope_type == "longrope" else None
        return int(original or self.max_position_embeddings)

    @property
    def max_supported_length(self) -> int:
        """Tokens that the rotation was made for. `llama3` and `longrope` checkpoints state the stretched length
        themselves; `linear`, `dynamic` and `yarn` ones state the length before stretching."""
        factor = float(self.scaling.get("factor") or 1.0)
        if self.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * factor)
        if self.rope_type == "yarn":
            original = self.scaling["original_max_position_embeddings"]
            return max(self.max_position_embeddings, int(original * factor))
        return self.max_position_embeddings


class RotaryEmbedding(Module):
    """Positions -> cosines and sines, for all layers of a step at once.

    The table of the first `max_length` positions is computed in float32 and rounded to `dtype`, as Hugging Face
    does; `longrope` has two; `dynamic` has none, its frequencies are computed for each token.
    """

    cos_sin_cache: torch.Tensor | None
    long_cos_sin_cache: torch.Tensor | None

    def __init__(
        self, rope: RopeConfig, max_length: int, *, dtype: torch.dtype = torch.float32, device: DeviceLike = "cpu"
    ) -> None:
        self._rope = rope
        self._dtype = dtype
        self.cos_sin_cache, self.long_cos_sin_cache = None, None
        positions = torch.arange(max_length, device=as_torch_device(device))
        if rope.rope_type != "dynamic":
            self.cos_sin_cache = _table(positions, *inverse_frequencies(rope), dtype)
        if rope.rope_type == "longrope" and max_length > rope.fixed_length:
            self.long_cos_sin_cache = _table(positions, *_longrope(rope, "long_factor"), dtype)

    def forward(self, positions: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """positions [T] -> [T, R]: P cosines, then P sines.

        lengths: int [T], for ropes that depend on the length only: the sequence length that sets each token's
        frequencies; by default the length up to the token itself.
        """
        assert lengths is None or self._rope.depends_on_length, (
            f"{self._rope.rope_type} rope does not depend on lengths"
        )
        lengths = positions + 1 if lengths is None and self._rope.depends_on_length else lengths
        if self.cos_sin_cache is not None:
            short = kernels.gather_rows(self.cos_sin_cache, positions)
            if self.long_cos_sin_cache is None or lengths is None:
                return short
            long = kernels.gather_rows(self.long_cos_sin_cache, positions)
            return torch.where((lengths > self._rope.fixed_length).unsqueeze(-1), long, short)
        assert lengths is not None, "a dynamic rope depends on the length"
        inv_freq = dynamic_frequencies(self._rope, lengths)
        return _cos_sin(positions.float().unsqueeze(-1) * inv_freq, 1.0, self._dtype)


def inverse_frequencies(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    """(inv_freq float32 [P], factor on cos and sin) of a rope that does not depend on the sequence length."""
    return _FREQUENCIES[rope.rope_type](rope)


def dynamic_frequencies(rope: RopeConfig, lengths: torch.Tensor) -> torch.Tensor:
    """inv_freq [T, P] for sequences of `lengths` [T]: theta * (factor L / L0 - (factor - 1)) ** (R / (R - 2)), where
    L is at least L0 = max_position_embeddings."""
    longest, factor = rope.max_position_embeddings, float(rope.scaling["factor"])
    stretch = factor * lengths.clamp(min=longest) / longest - (factor - 1)
    base = rope.theta * stretch.float() ** (rope.dim / (rope.dim - 2))
    return 1.0 / base.unsqueeze(-1) ** _exponents(rope.dim).to(lengths.device)


def _default(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    return 1.0 / rope.theta ** _exponents(rope.dim), 1.0


def _linear(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    return _default(rope)[0] / rope.scaling["factor"], 1.0


def _llama3(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    inv_freq, _ = _default(rope)
    numbers = rope.scaling
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    turns = numbers["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # in the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divide by factor, 1: keep
    return (1 - keep) * inv_freq / numbers["factor"] + keep * inv_freq, 1.0


def _yarn(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    original = rope.scaling["original_max_position_embeddings"]
    factor = float(rope.scaling.get("factor") or rope.max_position_embeddings / original)
    inv_freq, _ = _default(rope)
    low = _yarn_pair(rope, rope.scaling.get("beta_fast") or 32, original)
    high = _yarn_pair(rope, rope.scaling.get("beta_slow") or 1, original)
    if rope.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    slowed = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return slowed * inv_freq / factor + (1 - slowed) * inv_freq, _yarn_attention_factor(rope.scaling, factor)


def _yarn_pair(rope: RopeConfig, rotations: float, original: int) -> float:
    """The (fractional) pair that makes `rotations` turns in the original context: Peng et al. 2023, eq. 17."""
    return rope.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_attention_factor(scaling: dict[str, Any], factor: float) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1.0)


def _longrope(rope: RopeConfig, name: str = "short_factor") -> tuple[torch.Tensor, float]:
    original, given = rope.fixed_length, rope.scaling.get("attention_factor")
    factor = float(rope.scaling.get("factor") or rope.max_position_embeddings / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = torch.tensor(rope.scaling[name], dtype=torch.float32)
    return 1.0 / (divisors * rope.theta ** _exponents(rope.dim)), usual if given is None else float(given)


_FREQUENCIES: dict[str, Callable[[RopeConfig], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _exponents(dim: int) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32) / dim


def _table(
    positions: torch.Tensor, inv_freq: torch.Tensor, attention_factor: float, dtype: torch.dtype
) -> torch.Tensor:
    """[positions, 2 P]. In one thread: waking others takes longer, and they spin where others have the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _cos_sin(positions.float().unsqueeze(-1) * inv_freq.to(positions.device), attention_factor, dtype)
    finally:
        torch.set_num_threads(num_threads)


def _cos_sin(angles: torch.Tensor, attention_factor: float, dtype: torch.dtype) -> torch.Tensor:
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor).to(dtype)
