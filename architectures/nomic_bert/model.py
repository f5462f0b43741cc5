"""NomicBertEncoder: the Nomic BERT network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.nomic_bert.model_config import NomicBertConfig
from architectures.nomic_bert.nomic_bert import NomicBert
from architectures.nomic_bert.weight_adapters import safetensors_name_map
from max_ray.modeling.encoder_model import EncoderModel


class NomicBertEncoder(EncoderModel):
    """A Nomic BERT on its one device."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> NomicBertConfig:
        return NomicBertConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> NomicBert:
        return NomicBert(self.config_of(self.huggingface_config), max_length, self.tp, dtype)
