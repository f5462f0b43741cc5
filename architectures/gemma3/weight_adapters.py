"""Names of Gemma 3 weights: from a checkpoint's to the network's. `{}` is the layer; `:q` a part of a fused weight."""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap

_NORMS = [
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "attention_out_norm"),
    ("pre_feedforward_layernorm", "mlp_norm"),
    ("post_feedforward_layernorm", "mlp_out_norm"),
    ("self_attn.q_norm", "attention.q_norm"),
    ("self_attn.k_norm", "attention.k_norm"),
]
_ATTENTION = [("q_proj", "qkv", ":q"), ("k_proj", "qkv", ":k"), ("v_proj", "qkv", ":v"), ("o_proj", "out", "")]


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names. Embedding and head are one weight unless config.json says otherwise."""
    tied = bool(huggingface_config.get("tie_word_embeddings", True))
    table: list[tuple[str, str | None]] = [
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", None if tied else "lm_head.weight"),
        ("model.layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.gate_up.weight:gate"),
        ("model.layers.{}.mlp.up_proj.weight", "layers.{}.mlp.gate_up.weight:up"),
        ("model.layers.{}.mlp.down_proj.weight", "layers.{}.mlp.down.weight"),
    ]
    for theirs, ours in _NORMS:
        table.append((f"model.layers.{{}}.{theirs}.weight", f"layers.{{}}.{ours}.weight"))
    for theirs, ours, part in _ATTENTION:
        for kind in ("weight", "bias"):
            table.append((f"model.layers.{{}}.self_attn.{theirs}.{kind}", f"layers.{{}}.attention.{ours}.{kind}{part}"))
    return NameMap(table)
