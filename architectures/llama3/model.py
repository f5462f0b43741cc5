"""Llama3Model: the Llama network as the pipeline sees it: loads one rank's shard, then runs batches."""

from __future__ import annotations

from typing import Any

import torch

from architectures.llama3.llama3 import Llama3
from architectures.llama3.model_config import Llama3Config
from architectures.llama3.weight_adapters import safetensors_name_map
from max_ray.modeling import CausalLMModel


class Llama3Model(CausalLMModel):
    """One rank of a Llama."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> Llama3Config:
        return Llama3Config.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> Llama3:
        return Llama3(self.config_of(self.huggingface_config), max_length, self.tp, dtype)
