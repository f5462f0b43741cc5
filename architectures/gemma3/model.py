"""Gemma3Model and Gemma3Embedder: the Gemma 3 network as the pipelines see it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.gemma3.gemma3 import Gemma3
from architectures.gemma3.model_config import Gemma3Config
from architectures.gemma3.weight_adapters import embedder_name_map, safetensors_name_map
from max_ray.modeling import CausalLMModel
from max_ray.modeling.causal_embedder import CausalEmbedder, without_head


class Gemma3Model(CausalLMModel):
    """One rank of a Gemma 3."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> Gemma3Config:
        return Gemma3Config.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> Gemma3:
        return Gemma3(self.config_of(self.huggingface_config), max_length, self.tp, dtype)


class Gemma3Embedder(CausalEmbedder, Gemma3Model):
    """One rank of a Gemma 3 that makes embeddings (EmbeddingGemma, Vera et al. 2025)."""

    weight_names = staticmethod(embedder_name_map)

    @classmethod
    def default_pooling(cls) -> str:
        """All tokens: each has seen the whole text."""
        return "mean"

    @classmethod
    def config_of(cls, huggingface_config: Any) -> Gemma3Config:
        return Gemma3Config.embedder(huggingface_config)

    @classmethod
    def sees_both_ways(cls, huggingface_config: Any) -> bool:
        """As `use_bidirectional_attention` says."""
        return bool(huggingface_config.get("use_bidirectional_attention"))

    def build_network(self, max_length: int, dtype: torch.dtype) -> Gemma3:
        return without_head(super().build_network(max_length, dtype))
