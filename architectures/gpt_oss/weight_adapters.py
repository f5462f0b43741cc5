"""Names of gpt-oss weights: from a checkpoint's to the network's. `{}` is the layer; `:q` a part of a fused weight."""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap, with_bare_names

_ATTENTION = [("q_proj", "qkv", ":q"), ("k_proj", "qkv", ":k"), ("v_proj", "qkv", ":v"), ("o_proj", "out", "")]
_GGUF_ATTENTION = [
    ("attn_q", "qkv", ":q"),
    ("attn_k", "qkv", ":k"),
    ("attn_v", "qkv", ":v"),
    ("attn_output", "out", ""),
]
_EXPERTS = [
    ("gate_up_proj", "gate_up"),
    ("gate_up_proj_bias", "gate_up_bias"),
    ("down_proj", "down"),
    ("down_proj_bias", "down_bias"),
]


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names. The weights of all experts of a layer are one tensor there, and here."""
    tied = bool(huggingface_config.get("tie_word_embeddings"))
    table: list[tuple[str, str | None]] = [
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", None if tied else "lm_head.weight"),
        ("model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight"),
        ("model.layers.{}.post_attention_layernorm.weight", "layers.{}.mlp_norm.weight"),
        ("model.layers.{}.self_attn.sinks", "layers.{}.attention.sinks"),
    ]
    for kind in ("weight", "bias"):
        table.append((f"model.layers.{{}}.mlp.router.{kind}", f"layers.{{}}.mlp.router.{kind}"))
        for theirs, ours, part in _ATTENTION:
            table.append((f"model.layers.{{}}.self_attn.{theirs}.{kind}", f"layers.{{}}.attention.{ours}.{kind}{part}"))
    for theirs, ours in _EXPERTS:
        table.append((f"model.layers.{{}}.mlp.experts.{theirs}", f"layers.{{}}.mlp.experts.{ours}"))
    return NameMap(with_bare_names(table))


def gguf_name_map(huggingface_config: Any) -> NameMap:
    """The table for GGUF's names, experts fused again (`FusedExpertsGguf`). A file without `output` is tied."""
    table: list[tuple[str, str | None]] = [
        ("token_embd.weight", "embed_tokens.weight"),
        ("output_norm.weight", "norm.weight"),
        ("output.weight", None if huggingface_config.get("tie_word_embeddings") else "lm_head.weight"),
        ("blk.{}.attn_norm.weight", "layers.{}.attention_norm.weight"),
        ("blk.{}.post_attention_norm.weight", "layers.{}.mlp_norm.weight"),
        ("blk.{}.attn_sinks.weight", "layers.{}.attention.sinks"),
        ("blk.{}.ffn_gate_up_exps.weight", "layers.{}.mlp.experts.gate_up"),
        ("blk.{}.ffn_gate_up_exps.bias", "layers.{}.mlp.experts.gate_up_bias"),
        ("blk.{}.ffn_down_exps.weight", "layers.{}.mlp.experts.down"),
        ("blk.{}.ffn_down_exps.bias", "layers.{}.mlp.experts.down_bias"),
    ]
    for kind in ("weight", "bias"):
        table.append((f"blk.{{}}.ffn_gate_inp.{kind}", f"layers.{{}}.mlp.router.{kind}"))
        for theirs, ours, part in _GGUF_ATTENTION:
            table.append((f"blk.{{}}.{theirs}.{kind}", f"layers.{{}}.attention.{ours}.{kind}{part}"))
    return NameMap(table)
