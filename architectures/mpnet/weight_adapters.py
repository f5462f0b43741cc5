"""Names of MPNet weights: a BERT's, but for those of an attention layer, and a bias by distance."""

from __future__ import annotations

from typing import Any

from architectures.bert.weight_adapters import name_map
from max_ray.weights.mapping import NameMap

_ATTENTION = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "out": "attn.o", "norm": "LayerNorm"}


def safetensors_name_map(huggingface_config: Any) -> NameMap:
    """The table for Hugging Face's names, bare or behind `mpnet.`; see `name_map`."""
    bias = {"encoder.relative_attention_bias.weight": "relative_bias.weight"}
    return name_map("mpnet.", ["lm_head.*"], bias, _ATTENTION)
