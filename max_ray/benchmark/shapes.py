"""Shapes of models to measure with random weights: config.json files without a checkpoint. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from max_ray.errors import ConfigError, nearest

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, longest: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    return _LLAMA | sizes | {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": longest,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": _llama(4096, 14336, 32, 32, 8, 128_256, 131_072),
    "llama-1b": _llama(2048, 8192, 16, 32, 8, 128_256, 131_072) | {"tie_word_embeddings": True},
    "llama-160m": _llama(768, 3072, 12, 12, 4, 32_000, 4096),
    "qwen3-160m": _llama(768, 3072, 12, 12, 4, 32_000, 4096) | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "rms_norm_eps": 1e-6,
    },
    "tiny": _llama(64, 128, 2, 4, 2, 272, 4096),
}  # fmt: skip
"""Numbers of Llama 3.1 8B and of Llama 3.2 1B (model cards of meta-llama), and some that any machine can run."""


def load_shape(name: str) -> dict[str, Any]:
    """A preset by name, or the config.json at this path. Raises ConfigError."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--shape {name} is neither a file nor one of {', '.join(SHAPES)}.{nearest(name, SHAPES)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must hold a JSON object, as config.json does.")
    return values
