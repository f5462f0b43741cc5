"""Names of Mistral weights: from a checkpoint's to the network's. `{}` is the layer; `:q` a part of a fused weight."""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap

_ATTENTION = [("q_proj", "qkv", ":q"), ("k_proj", "qkv", ":k"), ("v_proj", "qkv", ":v"), ("o_proj", "out", "")]


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names. A tied checkpoint may carry a copy of the embedding as its head: dropped."""
    tied = bool(huggingface_config.get("tie_word_embeddings"))
    table: list[tuple[str, str | None]] = [
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", None if tied else "lm_head.weight"),
        ("model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight"),
        ("model.layers.{}.self_attn.rotary_emb.inv_freq", None),
        ("model.layers.{}.post_attention_layernorm.weight", "layers.{}.mlp_norm.weight"),
        ("model.layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.gate_up.weight:gate"),
        ("model.layers.{}.mlp.up_proj.weight", "layers.{}.mlp.gate_up.weight:up"),
        ("model.layers.{}.mlp.down_proj.weight", "layers.{}.mlp.down.weight"),
    ]
    for theirs, ours, part in _ATTENTION:
        table.append((f"model.layers.{{}}.self_attn.{theirs}.weight", f"layers.{{}}.attention.{ours}.weight{part}"))
    return NameMap(table)
