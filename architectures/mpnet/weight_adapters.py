"""Names of MPNet weights: from a checkpoint's to the network's. `{}` is the layer; `:q` a part of a fused weight."""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap

_LAYER = "encoder.layer.{}."
_PRODUCTS = [
    ("attention.attn.q", "attention.qkv", ":q"),
    ("attention.attn.k", "attention.qkv", ":k"),
    ("attention.attn.v", "attention.qkv", ":v"),
    ("attention.attn.o", "attention.out", ""),
    ("attention.LayerNorm", "attention_norm", ""),
    ("intermediate.dense", "mlp.up", ""),
    ("output.dense", "mlp.down", ""),
    ("output.LayerNorm", "mlp_norm", ""),
]


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names, bare or behind `mpnet.`; the pooler, the head of pre-training and the list of
    positions that old checkpoints carry are dropped."""
    table: list[tuple[str, str | None]] = []
    for prefix in ("", "mpnet."):
        table += [
            (f"{prefix}embeddings.word_embeddings.weight", "embed_tokens.words.weight"),
            (f"{prefix}embeddings.position_embeddings.weight", "embed_tokens.positions.weight"),
            (f"{prefix}encoder.relative_attention_bias.weight", "relative_bias.weight"),
            (f"{prefix}embeddings.position_ids", None),
            (f"{prefix}pooler.*", None),
        ]
        for kind in ("weight", "bias"):
            table.append((f"{prefix}embeddings.LayerNorm.{kind}", f"embed_tokens.norm.{kind}"))
            for theirs, ours, part in _PRODUCTS:
                table.append((f"{prefix}{_LAYER}{theirs}.{kind}", f"layers.{{}}.{ours}.{kind}{part}"))
    return NameMap([*table, ("lm_head.*", None)])
