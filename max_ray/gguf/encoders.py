"""Keys of encoders (BERT, ModernBERT) as the values of a config.json."""

from __future__ import annotations

from typing import Any

from max_ray.gguf.file import GgufFile
from max_ray.gguf.keys import Keys

Values = dict[str, Any]


def bert_values(file: GgufFile, keys: Keys, values: Values) -> Values:
    """A BERT; RoBERTa-like models too, whose converter cuts the rows off the position table that no token uses."""
    _check_direction(keys)
    types, positions = file.tensors.get("token_types.weight"), file.tensors.get("position_embd.weight")
    made: Values = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "layer_norm_eps": keys.positive("attention.layer_norm_epsilon", 1e-12),
        "hidden_act": keys.get("hidden_activation") or "gelu",
        "type_vocab_size": 0 if types is None else types.shape[0],
    }
    return made if positions is None else {**made, "max_position_embeddings": positions.shape[0]}


def modern_bert_values(file: GgufFile, keys: Keys, values: Values) -> Values:
    """A ModernBERT. `sliding_window` counts both sides of a token."""
    _check_direction(keys)
    keys.must_be("rope.dimension_count", values["hidden_size"] // values["num_attention_heads"])
    if keys.get("rope.scaling.type") not in (None, "none"):
        raise keys.wrong("rope.scaling.type", keys.get("rope.scaling.type"), "none in this family")
    return {
        "architectures": ["ModernBertModel"],
        "model_type": "modernbert",
        "norm_eps": keys.positive("attention.layer_norm_epsilon", values["rms_norm_eps"]),
        "norm_bias": "output_norm.bias" in file.tensors,
        "attention_bias": "blk.0.attn_qkv.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "hidden_activation": keys.get("hidden_activation") or "gelu",
        "global_rope_theta": keys.positive("rope.freq_base", 160_000.0),
        "local_rope_theta": keys.positive("rope.freq_base_swa", 10_000.0),
        **_windows(keys, values["num_hidden_layers"]),
    }


def _windows(keys: Keys, num_layers: int) -> Values:
    """Layers 0, n, 2 n ... see the whole text; every third where the file does not say."""
    window, pattern = keys.count_or_none("attention.sliding_window"), keys.get("attention.sliding_window_pattern")
    if window is None:
        return {"layer_types": ["full_attention"] * num_layers}
    if not isinstance(pattern, list):
        every = keys.count("attention.sliding_window_pattern", optional=True) or 3
        return {"local_attention": window, "global_attn_every_n_layers": every}
    if len(pattern) < num_layers:
        raise keys.wrong("attention.sliding_window_pattern", pattern, f"a flag for each of {num_layers} layers")
    kinds = ["sliding_attention" if flag else "full_attention" for flag in pattern[:num_layers]]
    return {"local_attention": window, "layer_types": kinds}


def _check_direction(keys: Keys) -> None:
    keys.must_be("attention.causal", False)
