"""Qwen3MoeModel: the Qwen3 mixture of experts network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.qwen3_moe.model_config import Qwen3MoeConfig
from architectures.qwen3_moe.qwen3_moe import Qwen3Moe
from architectures.qwen3_moe.weight_adapters import safetensors_name_map
from max_ray.modeling import CausalLMModel


class Qwen3MoeModel(CausalLMModel):
    """One rank of a Qwen3 mixture of experts."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> Qwen3MoeConfig:
        return Qwen3MoeConfig.from_huggingface(huggingface_config)

    @classmethod
    def num_experts(cls, huggingface_config: Any) -> int:
        return cls.config_of(huggingface_config).num_experts

    def build_network(self, max_length: int, dtype: torch.dtype) -> Qwen3Moe:
        spread = self.pipeline_config.expert_parallel
        return Qwen3Moe(self.config_of(self.huggingface_config), max_length, self.tp, dtype, spread)
