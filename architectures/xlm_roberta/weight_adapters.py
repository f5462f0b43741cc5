"""Names of XLM-RoBERTa weights: a BERT's, behind another prefix; those with a rope have names of their own. `{}` is the
layer."""

from __future__ import annotations

from typing import Any

from architectures.bert.weight_adapters import name_map
from architectures.xlm_roberta.model_config import is_rotary
from max_ray.weights.mapping import NameMap

_LORA = ("*.lora_A", "*.lora_B")
"""Tensors of the published checkpoints' adapters, one for each task."""

_WRAPPED = "parametrizations.weight.original"  # a weight that has such adapters
_LAYER = [
    ("mixer.Wqkv", "attention.qkv"),
    ("mixer.out_proj", "attention.out"),
    ("norm1", "attention_norm"),
    ("mlp.fc1", "mlp.up"),
    ("mlp.fc2", "mlp.down"),
    ("norm2", "mlp_norm"),
]


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names, bare or behind `roberta.`; see `name_map`."""
    if is_rotary(huggingface_config):
        return _rotary_name_map()
    return name_map(
        "roberta.",
        ["lm_head.*", "classifier.*"],
        {"embeddings.token_type_embeddings.weight": "embed_tokens.types.weight"},
    )


def _rotary_name_map() -> NameMap:
    """The names of the published code, which transformers writes, too. Weights with adapters are taken without them;
    the pooler and heads are dropped."""
    table: list[tuple[str, str | None]] = [(name, None) for name in ("lm_head.*", "classifier.*", *_LORA)]
    for prefix in ("", "roberta."):
        names = {
            f"{prefix}embeddings.word_embeddings": "embed_tokens",
            f"{prefix}embeddings.token_type_embeddings": "types",
            f"{prefix}emb_ln": "embed_norm",
            **{f"{prefix}encoder.layers.{{}}.{theirs}": f"layers.{{}}.{ours}" for theirs, ours in _LAYER},
        }
        table.append((f"{prefix}pooler.*", None))
        for theirs, ours in names.items():
            table += [(f"{theirs}.{kind}", f"{ours}.weight") for kind in ("weight", _WRAPPED)]
            table.append((f"{theirs}.bias", f"{ours}.bias"))
    return NameMap(table)
