"""GptOssConfig: the numbers of one gpt-oss checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.nn.layer_types import FULL, SLIDING, layer_types, layer_windows
from max_ray.nn.rope import RopeConfig

_DEFAULT_HEAD_DIM = 64
_DEFAULT_WINDOW = 128
_DEFAULT_LENGTH = 131_072
_DEFAULT_THETA = 150_000.0
_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class GptOssConfig:
    """Shapes of the whole model, before it is cut over ranks. intermediate_size: the width of one expert.

    windows: each layer's sliding window in tokens, None where it sees everything.
    gate_alpha, gate_limit: of the experts' activation, see GptOssExperts.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    windows: tuple[int | None, ...]
    num_experts: int
    num_experts_per_token: int
    gate_alpha: float
    gate_limit: float

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"intermediate_size": self.intermediate_size}

    @classmethod
    def from_huggingface(cls, config: Any) -> GptOssConfig:
        """From config.json as an attribute-style mapping. Raises ConfigError for a value that this family lacks."""
        _refuse_unknown(config)
        num_heads = required(config, "num_attention_heads")
        size = config.get("head_dim") or _DEFAULT_HEAD_DIM
        return cls(
            vocab_size=required(config, "vocab_size"),
            hidden_size=required(config, "hidden_size"),
            intermediate_size=required(config, "intermediate_size"),
            num_layers=required(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=size,
            rms_norm_eps=config.get("rms_norm_eps") or 1e-5,
            rope=_rope(config, size),
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
            attention_bias=bool(config.get("attention_bias", True)),
            windows=_windows(config),
            num_experts=required(config, "num_local_experts"),
            num_experts_per_token=config.get("num_experts_per_tok") or required(config, "experts_per_token"),
            gate_alpha=float(config.get("swiglu_alpha") or 1.702),
            gate_limit=float(config.get("swiglu_limit") or 7.0),
        )


def _refuse_unknown(config: Any) -> None:
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        raise ConfigError(f"config.json: hidden_act={activation!r}, but the gpt-oss family has 'silu' only.")
    quantized = (config.get("quantization_config") or {}).get("quant_method")
    if quantized and quantized != "mxfp4":
        raise ConfigError(
            f"This gpt-oss checkpoint is quantized ({quantized}); the family reads plain ones, and mxfp4 as published."
        )


def _windows(config: Any) -> tuple[int | None, ...]:
    """Without `layer_types`, every other layer, the first included, has the window."""
    num_layers = required(config, "num_hidden_layers")
    default = [FULL if layer % 2 else SLIDING for layer in range(num_layers)]
    return layer_windows(layer_types(config, num_layers, default), config.get("sliding_window", _DEFAULT_WINDOW))


def _rope(config: Any, size: int) -> RopeConfig:
    """Where config.json has no rope at all, that of the published models."""
    given = config.get("rope_scaling") or config.get("rope_parameters")
    numbers = {
        "rope_parameters": given or _DEFAULT_ROPE,
        "rope_theta": config.get("rope_theta"),
        "max_position_embeddings": config.get("max_position_embeddings") or _DEFAULT_LENGTH,
        "original_max_position_embeddings": config.get("original_max_position_embeddings"),
        "partial_rotary_factor": config.get("partial_rotary_factor"),
    }
    return RopeConfig.of_whole_heads(numbers, size, _DEFAULT_THETA)
