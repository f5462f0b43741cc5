"""Names of DistilBERT weights: from a checkpoint's to the network's. `{}` is the layer; `:q` a part of a fused one."""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap

_LAYER = [
    ("attention.q_lin", "attention.qkv", ":q"),
    ("attention.k_lin", "attention.qkv", ":k"),
    ("attention.v_lin", "attention.qkv", ":v"),
    ("attention.out_lin", "attention.out", ""),
    ("sa_layer_norm", "attention_norm", ""),
    ("ffn.lin1", "mlp.up", ""),
    ("ffn.lin2", "mlp.down", ""),
    ("output_layer_norm", "mlp_norm", ""),
]
_HEADS = ("vocab_transform", "vocab_layer_norm", "vocab_projector")


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names, bare or behind `distilbert.`; the head of the pre-training and the list of
    positions that old checkpoints carry are dropped."""
    table: list[tuple[str, str | None]] = [(f"{head}.*", None) for head in _HEADS]
    for prefix in ("", "distilbert."):
        table += [
            (f"{prefix}embeddings.word_embeddings.weight", "embed_tokens.words.weight"),
            (f"{prefix}embeddings.position_embeddings.weight", "embed_tokens.positions.weight"),
            (f"{prefix}embeddings.position_ids", None),
        ]
        for kind in ("weight", "bias"):
            table.append((f"{prefix}embeddings.LayerNorm.{kind}", f"embed_tokens.norm.{kind}"))
            for theirs, ours, part in _LAYER:
                table.append((f"{prefix}transformer.layer.{{}}.{theirs}.{kind}", f"layers.{{}}.{ours}.{kind}{part}"))
    return NameMap(table)
