"""DeepseekV2Model and DeepseekV3Model: the DeepSeek network as the pipeline sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from architectures.deepseek.deepseek import Deepseek
from architectures.deepseek.model_config import DeepseekConfig
from architectures.deepseek.weight_adapters import safetensors_name_map
from max_ray.interfaces import KVCacheParams
from max_ray.modeling import CausalLMModel

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig


class DeepseekV2Model(CausalLMModel):
    """One rank of a DeepSeek-V2."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> DeepseekConfig:
        return DeepseekConfig.v2(huggingface_config)

    @classmethod
    def get_kv_params(
        cls, pipeline_config: PipelineConfig, huggingface_config: Any, encoding: Any, tp_size: int = 1
    ) -> KVCacheParams:
        """One latent and one rotated key a token and layer, on every rank; no values."""
        return replace(super().get_kv_params(pipeline_config, huggingface_config, encoding, tp_size), value_dim=0)

    @classmethod
    def num_experts(cls, huggingface_config: Any) -> int:
        return cls.config_of(huggingface_config).routing.num_experts

    def build_network(self, max_length: int, dtype: torch.dtype) -> Deepseek:
        spread = self.pipeline_config.expert_parallel
        return Deepseek(self.config_of(self.huggingface_config), max_length, self.tp, dtype, spread)


class DeepseekV3Model(DeepseekV2Model):
    """One rank of a DeepSeek-V3."""

    @classmethod
    def config_of(cls, huggingface_config: Any) -> DeepseekConfig:
        return DeepseekConfig.v3(huggingface_config)
