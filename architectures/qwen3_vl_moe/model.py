"""Qwen3VLMoeModel: the Qwen3-VL mixture of experts as the pipeline sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from architectures.qwen3_moe.model_config import Qwen3MoeConfig
from architectures.qwen3_moe.qwen3_moe import Qwen3MoeBlock
from architectures.qwen3_vl.model import VisionLanguageModel
from architectures.qwen3_vl.model_config import VisionConfig, mrope_section
from architectures.qwen3_vl.qwen3_vl import VisionTransformer
from architectures.qwen3_vl_moe.model_config import moe_config
from architectures.qwen3_vl_moe.weight_adapters import UnfusedExperts, safetensors_name_map

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig
    from max_ray.distributed import TPGroup
    from max_ray.weights import WeightSource


class Qwen3VLMoeModel(VisionLanguageModel):
    """One rank of a Qwen3-VL mixture of experts."""

    weight_names = staticmethod(safetensors_name_map)

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        huggingface_config: Any,
        encoding: Any,
        device: torch.device,
        tp: TPGroup,
        weights: WeightSource,
        adapter: Callable[..., Any] | None = None,
    ) -> None:
        config = self.config_of(huggingface_config)
        unfused = UnfusedExperts(weights, config.num_experts, config.hidden_size, config.expert_size)
        super().__init__(pipeline_config, huggingface_config, encoding, device, tp, unfused, adapter)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> Qwen3MoeConfig:
        return moe_config(huggingface_config)

    @classmethod
    def num_experts(cls, huggingface_config: Any) -> int:
        return cls.config_of(huggingface_config).num_experts

    def build_network(self, max_length: int, dtype: torch.dtype) -> VisionTransformer:
        config, spread = self.config_of(self.huggingface_config), self.pipeline_config.expert_parallel
        layers = [Qwen3MoeBlock(config, i, self.tp, dtype, spread) for i in range(config.num_layers)]
        vision = VisionConfig.from_huggingface(self.huggingface_config)
        section = mrope_section(self.huggingface_config)
        return VisionTransformer(config, layers, vision, section, max_length, self.tp, dtype)
