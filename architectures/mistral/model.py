"""MistralModel, MinistralModel and MistralEmbedder: the Mistral network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.mistral.mistral import Mistral
from architectures.mistral.model_config import MistralConfig
from architectures.mistral.weight_adapters import embedder_name_map, safetensors_name_map
from max_ray.modeling import CausalLMModel
from max_ray.modeling.causal_embedder import CausalEmbedder, without_head


class MistralModel(CausalLMModel):
    """One rank of a Mistral."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> MistralConfig:
        return MistralConfig.mistral(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> Mistral:
        return Mistral(self.config_of(self.huggingface_config), max_length, self.tp, dtype)


class MinistralModel(MistralModel):
    """One rank of a Ministral."""

    @classmethod
    def config_of(cls, huggingface_config: Any) -> MistralConfig:
        return MistralConfig.ministral(huggingface_config)


class MistralEmbedder(CausalEmbedder, MistralModel):
    """One rank of a Mistral that makes embeddings (E5-Mistral, Wang et al. 2024)."""

    weight_names = staticmethod(embedder_name_map)

    def build_network(self, max_length: int, dtype: torch.dtype) -> Mistral:
        return without_head(super().build_network(max_length, dtype))
