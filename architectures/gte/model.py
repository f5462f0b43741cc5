"""GteEncoder: the GTE v1.5 network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.gte.gte import Gte
from architectures.gte.model_config import GteConfig
from architectures.gte.weight_adapters import safetensors_name_map
from max_ray.modeling.encoder_model import EncoderModel


class GteEncoder(EncoderModel):
    """A GTE on its one device."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> GteConfig:
        return GteConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> Gte:
        return Gte(self.config_of(self.huggingface_config), max_length, self.tp, dtype)
