"""Names of BERT weights: from a checkpoint's to the network's. `{}` is the layer; `:q` a part of a fused weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from max_ray.weights.mapping import NameMap

_ATTENTION = {"q": "self.query", "k": "self.key", "v": "self.value", "out": "output.dense", "norm": "output.LayerNorm"}


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names, bare or behind `bert.`."""
    return name_map(
        "bert.", ["cls.*", "classifier.*"], {"embeddings.token_type_embeddings.weight": "embed_tokens.types.weight"}
    )


def name_map(
    prefix: str, dropped: list[str], more: Mapping[str, str], attention: Mapping[str, str] = _ATTENTION
) -> NameMap:
    """The table of a family of the BERT kind, whose names stand bare or behind `prefix`; the pooler, the heads of
    pre-training (`dropped`) and the list of positions that old checkpoints carry are dropped.

    more: names that this family has besides. attention: its names of the parts of an attention layer.
    """
    table: list[tuple[str, str | None]] = [(name, None) for name in dropped]
    plain = {
        "embeddings.word_embeddings.weight": "embed_tokens.words.weight",
        "embeddings.position_embeddings.weight": "embed_tokens.positions.weight",
        "embeddings.position_ids": None,
        "pooler.*": None,
        **more,
    }
    for start in ("", prefix):
        table += [(start + theirs, ours) for theirs, ours in plain.items()]
        for kind in ("weight", "bias"):
            table.append((f"{start}embeddings.LayerNorm.{kind}", f"embed_tokens.norm.{kind}"))
            for theirs, ours, part in _layer(attention):
                table.append((f"{start}encoder.layer.{{}}.{theirs}.{kind}", f"layers.{{}}.{ours}.{kind}{part}"))
    return NameMap(table)


def _layer(attention: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [
        *((f"attention.{attention[part]}", "attention.qkv", f":{part}") for part in "qkv"),
        (f"attention.{attention['out']}", "attention.out", ""),
        (f"attention.{attention['norm']}", "attention_norm", ""),
        ("intermediate.dense", "mlp.up", ""),
        ("output.dense", "mlp.down", ""),
        ("output.LayerNorm", "mlp_norm", ""),
    ]


_GGUF_LAYER = [
    *((f"attn_{part}", "attention.qkv", f":{part}") for part in "qkv"),
    ("attn_output", "attention.out", ""),
    ("attn_output_norm", "attention_norm", ""),
    ("ffn_up", "mlp.up", ""),
    ("ffn_down", "mlp.down", ""),
    ("layer_output_norm", "mlp_norm", ""),
]


def gguf_name_map(huggingface_config: Any) -> NameMap:
    """The table for GGUF's names."""
    table: list[tuple[str, str | None]] = [
        ("token_embd.weight", "embed_tokens.words.weight"),
        ("position_embd.weight", "embed_tokens.positions.weight"),
        ("token_types.weight", "embed_tokens.types.weight"),
    ]
    for kind in ("weight", "bias"):
        table.append((f"token_embd_norm.{kind}", f"embed_tokens.norm.{kind}"))
        table += [(f"blk.{{}}.{a}.{kind}", f"layers.{{}}.{b}.{kind}{part}") for a, b, part in _GGUF_LAYER]
    return NameMap(table)
