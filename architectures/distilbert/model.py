"""DistilBertEncoder: the DistilBERT network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.distilbert.distilbert import DistilBert
from architectures.distilbert.model_config import DistilBertConfig
from architectures.distilbert.weight_adapters import safetensors_name_map
from max_ray.modeling.encoder_model import EncoderModel


class DistilBertEncoder(EncoderModel):
    """One rank of a DistilBERT."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> DistilBertConfig:
        return DistilBertConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> DistilBert:
        return DistilBert(self.config_of(self.huggingface_config), self.tp, dtype)
