"""MixtralModel: the Mixtral network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.mixtral.mixtral import Mixtral
from architectures.mixtral.model_config import MixtralConfig
from architectures.mixtral.weight_adapters import safetensors_name_map
from max_ray.modeling import CausalLMModel


class MixtralModel(CausalLMModel):
    """One rank of a Mixtral."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> MixtralConfig:
        return MixtralConfig.from_huggingface(huggingface_config)

    @classmethod
    def num_experts(cls, huggingface_config: Any) -> int:
        return cls.config_of(huggingface_config).num_experts

    def build_network(self, max_length: int, dtype: torch.dtype) -> Mixtral:
        spread = self.pipeline_config.expert_parallel
        return Mixtral(self.config_of(self.huggingface_config), max_length, self.tp, dtype, spread)
