"""Qwen2Model, Qwen3Model and their embedders: the dense Qwen network as the pipelines see it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.qwen.model_config import QwenConfig
from architectures.qwen.qwen import Qwen
from architectures.qwen.weight_adapters import embedder_name_map, safetensors_name_map
from max_ray.errors import ConfigError
from max_ray.modeling import CausalLMModel
from max_ray.modeling.causal_embedder import CausalEmbedder, without_head
from max_ray.modeling.score_layers import ScoreLayer, ScoreLayers, check_one_label


class Qwen2Model(CausalLMModel):
    """One rank of a Qwen2 or Qwen2.5."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> QwenConfig:
        return QwenConfig.qwen2(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> Qwen:
        return Qwen(self.config_of(self.huggingface_config), max_length, self.tp, dtype)


class Qwen3Model(Qwen2Model):
    """One rank of a Qwen3."""

    @classmethod
    def config_of(cls, huggingface_config: Any) -> QwenConfig:
        return QwenConfig.qwen3(huggingface_config)


class Qwen2Embedder(CausalEmbedder, Qwen2Model):
    """One rank of a Qwen2 that makes embeddings (gte-Qwen2, Li et al. 2023, whose tokens see the whole text)."""

    weight_names = staticmethod(embedder_name_map)

    @classmethod
    def sees_both_ways(cls, huggingface_config: Any) -> bool:
        """As `is_causal` says."""
        return huggingface_config.get("is_causal") is False

    @classmethod
    def check_direction(cls, huggingface_config: Any) -> None:
        """Raises ConfigError for layers with a sliding window where tokens see later ones: how far is undefined."""
        if cls.sees_both_ways(huggingface_config) and any(cls.config_of(huggingface_config).windows):
            raise ConfigError("config.json: is_causal=false together with a sliding window is not supported.")

    def build_network(self, max_length: int, dtype: torch.dtype) -> Qwen:
        return without_head(super().build_network(max_length, dtype))


class Qwen3Embedder(Qwen2Embedder, Qwen3Model):
    """One rank of a Qwen3 that makes embeddings (Qwen3-Embedding, Zhang et al. 2025)."""


class Qwen3Scorer(Qwen3Embedder):
    """One rank of a Qwen3 with a head of one label."""

    @classmethod
    def check_settings(cls, pipeline_config: Any, huggingface_config: Any) -> None:
        """See CausalLMModel; and ConfigError for more labels than one."""
        super().check_settings(pipeline_config, huggingface_config)
        check_one_label(huggingface_config)

    @classmethod
    def score_layers(cls, huggingface_config: Any) -> ScoreLayers:
        """The head, on the last token."""
        return ScoreLayers("lasttoken", (ScoreLayer(("score.weight",)),))


class Qwen3Judge(Qwen3Embedder):
    """One rank of a Qwen3 that answers yes or no (Qwen3-Reranker, Zhang et al. 2025): the score is the share of yes."""

    @classmethod
    def score_layers(cls, huggingface_config: Any) -> ScoreLayers:
        """Two rows of the language model's head, which may be the embedding's."""
        tied = ("model.embed_tokens.weight", "embed_tokens.weight")
        names = tied if huggingface_config.get("tie_word_embeddings") else ("lm_head.weight",)
        return ScoreLayers("lasttoken", (ScoreLayer(names),), contrast=("yes", "no"))
