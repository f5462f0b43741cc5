"""Names of Nomic BERT weights: from a checkpoint's to the network's. `{}` is the layer; `:gate` a part of a fused one.

Both published checkpoints and those that transformers writes have the names of the published code."""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap

_MATRICES = [
    ("attn.Wqkv", "attention.qkv", ""),
    ("attn.out_proj", "attention.out", ""),
    ("mlp.fc11", "mlp.gate_up", ":up"),
    ("mlp.fc12", "mlp.gate_up", ":gate"),
    ("mlp.fc2", "mlp.down", ""),
]
_NORMS = [("norm1", "attention_norm"), ("norm2", "mlp_norm")]


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names, bare or behind a prefix; pooler and head of the pre-training are dropped."""
    table: list[tuple[str, str | None]] = [("cls.*", None)]
    for prefix in ("", "bert.", "nomic_bert."):
        layer = f"{prefix}encoder.layers.{{}}"
        table += [
            (f"{prefix}embeddings.word_embeddings.weight", "embed_tokens.weight"),
            (f"{prefix}embeddings.token_type_embeddings.weight", "types.weight"),
            (f"{prefix}pooler.*", None),
        ]
        table += [(f"{layer}.{a}.weight", f"layers.{{}}.{b}.weight{part}") for a, b, part in _MATRICES]
        for kind in ("weight", "bias"):
            table.append((f"{prefix}emb_ln.{kind}", f"embed_norm.{kind}"))
            table += [(f"{layer}.{a}.{kind}", f"layers.{{}}.{b}.{kind}") for a, b in _NORMS]
    return NameMap(table)
