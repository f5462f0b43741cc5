"""Names of Qwen weights: from a checkpoint's to the network's. `{}` is the layer; `:q` a part of a fused weight."""

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


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names. A tied checkpoint may carry a copy of the embedding as its head: dropped."""
    tied = bool(huggingface_config.get("tie_word_embeddings"))
    return NameMap(with_bare_names(_table(None if tied else "lm_head.weight")))


def embedder_name_map(huggingface_config: Any) -> NameMap:
    """The same for an embedder or scorer, whose network has no head; names are bare where it was saved without one."""
    return NameMap([*with_bare_names(_table(None)), ("score.weight", None)])


def _table(head: str | None) -> list[tuple[str, str | None]]:
    table: list[tuple[str, str | None]] = [
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", head),
        ("model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight"),
        ("model.layers.{}.self_attn.rotary_emb.inv_freq", None),
        ("model.layers.{}.post_attention_layernorm.weight", "layers.{}.mlp_norm.weight"),
        ("model.layers.{}.self_attn.q_norm.weight", "layers.{}.attention.q_norm.weight"),
        ("model.layers.{}.self_attn.k_norm.weight", "layers.{}.attention.k_norm.weight"),
        ("model.layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.gate_up.weight:gate"),
        ("model.layers.{}.mlp.up_proj.weight", "layers.{}.mlp.gate_up.weight:up"),
        ("model.layers.{}.mlp.down_proj.weight", "layers.{}.mlp.down.weight"),
    ]
    for theirs, ours, part in _ATTENTION:
        for kind in ("weight", "bias"):
            table.append((f"model.layers.{{}}.self_attn.{theirs}.{kind}", f"layers.{{}}.attention.{ours}.{kind}{part}"))
    return table


def gguf_name_map(huggingface_config: Any) -> NameMap:
    """The table for GGUF's names. A file without `output` is tied."""
    return NameMap(_gguf_table(None if huggingface_config.get("tie_word_embeddings") else "lm_head.weight"))


def gguf_embedder_name_map(huggingface_config: Any) -> NameMap:
    """The same for an embedder, whose network has no head."""
    return NameMap(_gguf_table(None))


def _gguf_table(head: str | None) -> list[tuple[str, str | None]]:
    table: list[tuple[str, str | None]] = [
        ("token_embd.weight", "embed_tokens.weight"),
        ("output_norm.weight", "norm.weight"),
        ("output.weight", head),
        ("blk.{}.attn_norm.weight", "layers.{}.attention_norm.weight"),
        ("blk.{}.ffn_norm.weight", "layers.{}.mlp_norm.weight"),
        ("blk.{}.attn_q_norm.weight", "layers.{}.attention.q_norm.weight"),
        ("blk.{}.attn_k_norm.weight", "layers.{}.attention.k_norm.weight"),
        ("blk.{}.ffn_gate.weight", "layers.{}.mlp.gate_up.weight:gate"),
        ("blk.{}.ffn_up.weight", "layers.{}.mlp.gate_up.weight:up"),
        ("blk.{}.ffn_down.weight", "layers.{}.mlp.down.weight"),
    ]
    for theirs, ours, part in _GGUF_ATTENTION:
        for kind in ("weight", "bias"):
            table.append((f"blk.{{}}.{theirs}.{kind}", f"layers.{{}}.attention.{ours}.{kind}{part}"))
    return table
