"""config.json of published checkpoints whose network `transformers` has under another name, with its values.

MiniCPM (Hu et al. 2024) scales the embedding, what each layer adds, and the logits, as Granite does: a Granite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from max_ray.errors import ConfigError

_MINICPM_DEFAULTS: dict[str, Any] = {
    **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
    **{"tie_word_embeddings": True, "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1},
}
"""Of the published code."""


def as_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for the class of `transformers` with the same network; most are returned as they are.

    Raises:
        ConfigError: The checkpoint has parts that this class lacks.
    """
    return _minicpm(values) if values.get("model_type") == "minicpm" else dict(values)


def _minicpm(given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("num_experts"):
        raise ConfigError(f"config.json: num_experts={given['num_experts']!r}: MiniCPM with experts is not supported.")
    if given.get("sparse_config"):
        raise ConfigError(
            "config.json: sparse_config: sparse attention is not supported. Take it out of config.json to serve the "
            "model with dense attention, which the checkpoint has, too."
        )
    values = {**_MINICPM_DEFAULTS, **given}
    hidden_size, heads = values["hidden_size"], values["num_attention_heads"]
    scales = {
        "embedding_multiplier": values.pop("scale_emb"),
        "residual_multiplier": values.pop("scale_depth") / math.sqrt(values["num_hidden_layers"]),
        "logits_scaling": hidden_size / values.pop("dim_model_base"),
        "attention_multiplier": 1 / math.sqrt(values.get("head_dim") or hidden_size // heads),
    }
    return {**values, **scales, "model_type": "granite"}
