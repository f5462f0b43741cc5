"""Names of ModernBERT weights: from a checkpoint's to the network's. `{}` is the layer."""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap

_LAYER = [
    ("attn_norm", "attention_norm"),
    ("attn.Wqkv", "attention.qkv"),
    ("attn.Wo", "attention.out"),
    ("mlp_norm", "mlp_norm"),
    ("mlp.Wi", "mlp.up"),
    ("mlp.Wo", "mlp.down"),
]


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names, bare or behind `model.`; the heads of pre-training are dropped."""
    table: list[tuple[str, str | None]] = [("head.*", None), ("decoder.*", None)]
    for prefix in ("", "model."):
        table.append((f"{prefix}embeddings.tok_embeddings.weight", "embed_tokens.weight"))
        for kind in ("weight", "bias"):
            table.append((f"{prefix}embeddings.norm.{kind}", f"embed_norm.{kind}"))
            table.append((f"{prefix}final_norm.{kind}", f"norm.{kind}"))
            table += [(f"{prefix}layers.{{}}.{a}.{kind}", f"layers.{{}}.{b}.{kind}") for a, b in _LAYER]
    return NameMap(table)


_GGUF_LAYER = [
    ("attn_norm", "attention_norm"),
    ("attn_qkv", "attention.qkv"),
    ("attn_output", "attention.out"),
    ("ffn_norm", "mlp_norm"),
    ("ffn_up", "mlp.up"),
    ("ffn_down", "mlp.down"),
]


def gguf_name_map(huggingface_config: Any) -> NameMap:
    """The table for GGUF's names."""
    table: list[tuple[str, str | None]] = [("token_embd.weight", "embed_tokens.weight")]
    for kind in ("weight", "bias"):
        table.append((f"token_embd_norm.{kind}", f"embed_norm.{kind}"))
        table.append((f"output_norm.{kind}", f"norm.{kind}"))
        table += [(f"blk.{{}}.{a}.{kind}", f"layers.{{}}.{b}.{kind}") for a, b in _GGUF_LAYER]
    return NameMap(table)
