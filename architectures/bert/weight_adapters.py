"""Names of BERT weights: from a checkpoint's to the network's. `{}` is the layer; `:q` a part of a fused weight."""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap

_LAYER = "encoder.layer.{}."
_PRODUCTS = [
    ("attention.self.query", "attention.qkv", ":q"),
    ("attention.self.key", "attention.qkv", ":k"),
    ("attention.self.value", "attention.qkv", ":v"),
    ("attention.output.dense", "attention.out", ""),
    ("attention.output.LayerNorm", "attention_norm", ""),
    ("intermediate.dense", "mlp.up", ""),
    ("output.dense", "mlp.down", ""),
    ("output.LayerNorm", "mlp_norm", ""),
]


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names, bare or behind `bert.`; the pooler, the heads of pre-training and the list of
    positions that old checkpoints carry are dropped."""
    table: list[tuple[str, str | None]] = []
    for prefix in ("", "bert."):
        table += [
            (f"{prefix}embeddings.word_embeddings.weight", "embed_tokens.words.weight"),
            (f"{prefix}embeddings.position_embeddings.weight", "embed_tokens.positions.weight"),
            (f"{prefix}embeddings.token_type_embeddings.weight", "embed_tokens.types.weight"),
            (f"{prefix}embeddings.position_ids", None),
            (f"{prefix}pooler.*", None),
        ]
        for kind in ("weight", "bias"):
            table.append((f"{prefix}embeddings.LayerNorm.{kind}", f"embed_tokens.norm.{kind}"))
            for theirs, ours, part in _PRODUCTS:
                table.append((f"{prefix}{_LAYER}{theirs}.{kind}", f"layers.{{}}.{ours}.{kind}{part}"))
    return NameMap([*table, ("cls.*", None)])
