"""Gemma3Model: the Gemma 3 network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.gemma3.gemma3 import Gemma3
from architectures.gemma3.model_config import Gemma3Config
from architectures.gemma3.weight_adapters import safetensors_name_map
from max_ray.nn import CausalLMModel


class Gemma3Model(CausalLMModel):
    """One rank of a Gemma 3."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> Gemma3Config:
        return Gemma3Config.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> Gemma3:
        return Gemma3(self.config_of(self.huggingface_config), max_length, self.tp, dtype)
