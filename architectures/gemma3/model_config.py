"""Gemma3Config: the numbers of one Gemma 3 checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.nn.activation import activation_name
from max_ray.nn.layer_types import FULL, SLIDING, layer_types, layer_windows
from max_ray.nn.rope import RopeConfig

_DEFAULTS = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6}
_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}


@dataclass(frozen=True)
class Gemma3Config:
    """Shapes of the whole model, before it is cut over ranks.

    rope: of the layers with a sliding window; global_rope: of those that see everything.
    windows: each layer's sliding window in tokens, None where it sees everything.
    attention_scale: multiplies q k^T. logit_softcap: logits become cap * tanh(logits / cap), where it is set.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    activation: str
    rope: RopeConfig
    global_rope: RopeConfig
    windows: tuple[int | None, ...]
    attention_scale: float
    attention_bias: bool
    tie_word_embeddings: bool
    logit_softcap: float | None

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"intermediate_size": self.intermediate_size}

    @classmethod
    def from_huggingface(cls, config: Any) -> Gemma3Config:
        """From config.json as an attribute-style mapping. Raises ConfigError for a value that this family lacks."""
        _refuse(config, "use_bidirectional_attention")
        return cls._read(config, _number(config, "sliding_window"))

    @classmethod
    def embedder(cls, config: Any) -> Gemma3Config:
        """The same of an embedder. Where its tokens see later ones, half of the window lies on either side."""
        window = _number(config, "sliding_window")
        return cls._read(config, window // 2 + 1 if config.get("use_bidirectional_attention") else window)

    @classmethod
    def _read(cls, config: Any, window: int) -> Gemma3Config:
        _refuse(config, "attn_logit_softcapping")
        num_heads = required(config, "num_attention_heads")
        size = _number(config, "head_dim")
        return cls(
            vocab_size=required(config, "vocab_size"),
            hidden_size=required(config, "hidden_size"),
            intermediate_size=required(config, "intermediate_size"),
            num_layers=required(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=size,
            rms_norm_eps=config.get("rms_norm_eps") or 1e-6,
            activation=activation_name(config, "hidden_activation", "gelu_pytorch_tanh"),
            rope=_rope(config, SLIDING, size),
            global_rope=_rope(config, FULL, size),
            windows=_windows(config, window),
            attention_scale=_number(config, "query_pre_attn_scalar") ** -0.5,
            attention_bias=bool(config.get("attention_bias")),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
            logit_softcap=config.get("final_logit_softcapping"),
        )


def _refuse(config: Any, name: str) -> None:
    if config.get(name):
        raise ConfigError(f"config.json: {name}={config.get(name)!r} is not supported for the Gemma 3 family.")


def _number(config: Any, name: str) -> int:
    return int(config.get(name) or _DEFAULTS[name])


def _windows(config: Any, window: int) -> tuple[int | None, ...]:
    """Without `layer_types`, every sixth layer sees everything (or every `sliding_window_pattern`-th)."""
    num_layers, pattern = required(config, "num_hidden_layers"), _number(config, "sliding_window_pattern")
    default = [SLIDING if (layer + 1) % pattern else FULL for layer in range(num_layers)]
    return layer_windows(layer_types(config, num_layers, default), window)


def _rope(config: Any, kind: str, size: int) -> RopeConfig:
    """The rope of one kind of layer: `rope_parameters` by kind (transformers 5), completed by `rope_theta` and
    `rope_scaling` of the full layers and `rope_local_base_freq` of the sliding ones (before)."""
    given = (config.get("rope_parameters") or {}).get(kind)
    parameters = dict(given) if isinstance(given, Mapping) else {}
    if kind == FULL:
        parameters |= config.get("rope_scaling") or {}
    theta = config.get("rope_theta" if kind == FULL else "rope_local_base_freq")
    parameters.setdefault("rope_theta", theta or _THETA[kind])
    numbers = {
        "rope_parameters": parameters,
        "max_position_embeddings": required(config, "max_position_embeddings"),
        "partial_rotary_factor": config.get("partial_rotary_factor"),
    }
    rope = RopeConfig.of_whole_heads(numbers, size)
    if rope.depends_on_length:
        raise ConfigError(f"config.json: rope_type {rope.rope_type!r} is not supported for the Gemma 3 family.")
    return rope
