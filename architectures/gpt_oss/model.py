"""GptOssModel: the gpt-oss network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.gpt_oss.gpt_oss import GptOss
from architectures.gpt_oss.model_config import GptOssConfig
from architectures.gpt_oss.weight_adapters import safetensors_name_map
from max_ray.modeling import CausalLMModel


class GptOssModel(CausalLMModel):
    """One rank of a gpt-oss."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> GptOssConfig:
        return GptOssConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> GptOss:
        return GptOss(self.config_of(self.huggingface_config), max_length, self.tp, dtype)
