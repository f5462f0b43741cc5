"""ModernBertEncoder: the ModernBERT network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.modern_bert.model_config import ModernBertConfig
from architectures.modern_bert.modern_bert import ModernBert
from architectures.modern_bert.weight_adapters import safetensors_name_map
from max_ray.modeling.encoder_model import EncoderModel


class ModernBertEncoder(EncoderModel):
    """A ModernBERT on its one device."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> ModernBertConfig:
        return ModernBertConfig.from_huggingface(huggingface_config)

    @classmethod
    def default_pooling(cls) -> str:
        """The vector of the first token, as the model's own heads take it."""
        return "cls"

    def build_network(self, max_length: int, dtype: torch.dtype) -> ModernBert:
        return ModernBert(self.config_of(self.huggingface_config), max_length, self.tp, dtype)
