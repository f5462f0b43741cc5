"""Names of GTE v1.5 weights: from a checkpoint's to the network's. `{}` is the layer.

Both published checkpoints and those that transformers writes have the names of the published code."""

from __future__ import annotations

from typing import Any

from max_ray.weights.mapping import NameMap

_WITH_BIAS = [
    ("attention.qkv_proj", "attention.qkv"),
    ("attention.o_proj", "attention.out"),
    ("attn_ln", "attention_norm"),
    ("mlp.down_proj", "mlp.down"),
    ("mlp_ln", "mlp_norm"),
]


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names, bare or behind a prefix; heads of other tasks are dropped."""
    table: list[tuple[str, str | None]] = [("lm_head.*", None), ("classifier.*", None)]
    for prefix in ("", "new.", "gte."):
        layer = f"{prefix}encoder.layer.{{}}"
        table += [
            (f"{prefix}embeddings.word_embeddings.weight", "embed_tokens.weight"),
            (f"{prefix}embeddings.token_type_embeddings.weight", "types.weight"),
            (f"{prefix}embeddings.rotary_emb.inv_freq", None),
            (f"{prefix}embeddings.position_ids", None),
            (f"{prefix}pooler.*", None),
            (f"{layer}.mlp.up_gate_proj.weight", "layers.{}.mlp.up_gate.weight"),
        ]
        for kind in ("weight", "bias"):
            table.append((f"{prefix}embeddings.LayerNorm.{kind}", f"embed_norm.{kind}"))
            table += [(f"{layer}.{a}.{kind}", f"layers.{{}}.{b}.{kind}") for a, b in _WITH_BIAS]
    return NameMap(table)
