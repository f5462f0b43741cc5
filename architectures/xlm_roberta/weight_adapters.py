"""Names of XLM-RoBERTa weights: a BERT's, behind another prefix."""

from __future__ import annotations

from typing import Any

from architectures.bert.weight_adapters import name_map
from max_ray.weights.mapping import NameMap


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names, bare or behind `roberta.`; see `name_map`."""
    return name_map(
        "roberta.",
        ["lm_head.*", "classifier.*"],
        {"embeddings.token_type_embeddings.weight": "embed_tokens.types.weight"},
    )
