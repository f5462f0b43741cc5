"""MPNetEncoder: the MPNet network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.mpnet.model_config import PADDING_ID, MPNetConfig
from architectures.mpnet.mpnet import MPNet
from architectures.mpnet.weight_adapters import safetensors_name_map
from max_ray.modeling.encoder_model import EncoderModel, positions_after_padding
from max_ray.modeling.text_pipeline_model import IntArray


class MPNetEncoder(EncoderModel):
    """One rank of an MPNet."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> MPNetConfig:
        return MPNetConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> MPNet:
        return MPNet(self.config_of(self.huggingface_config), self.tp, dtype)

    def positions_of(self, tokens: IntArray, positions: IntArray, indptr: IntArray) -> IntArray:
        """See `positions_after_padding`."""
        return positions_after_padding(tokens, indptr, PADDING_ID)
