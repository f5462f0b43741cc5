"""BertEncoder: the BERT network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.bert.bert import Bert
from architectures.bert.model_config import BertConfig
from architectures.bert.weight_adapters import safetensors_name_map
from max_ray.modeling.encoder_model import EncoderModel


class BertEncoder(EncoderModel):
    """One rank of a BERT."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> BertConfig:
        return BertConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> Bert:
        return Bert(self.config_of(self.huggingface_config), self.tp, dtype)
