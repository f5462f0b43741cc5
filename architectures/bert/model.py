"""BertEncoder: the BERT network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.bert.bert import Bert, BertOfPairs
from architectures.bert.model_config import BertConfig
from architectures.bert.weight_adapters import safetensors_name_map
from max_ray.modeling.encoder_model import EncoderModel
from max_ray.modeling.score_layers import ScoreLayer, ScoreLayers, check_one_label


class BertEncoder(EncoderModel):
    """One rank of a BERT."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> BertConfig:
        return BertConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> Bert:
        return Bert(self.config_of(self.huggingface_config), self.tp, dtype)


class BertScorer(BertEncoder):
    """One rank of a BERT that scores pairs."""

    def build_network(self, max_length: int, dtype: torch.dtype) -> Bert:
        config = self.config_of(self.huggingface_config)
        return (BertOfPairs if config.num_token_types > 1 else Bert)(config, self.tp, dtype)

    @classmethod
    def check_settings(cls, pipeline_config: Any, huggingface_config: Any) -> None:
        """See EncoderModel; and ConfigError for more labels than one."""
        super().check_settings(pipeline_config, huggingface_config)
        check_one_label(huggingface_config)

    @classmethod
    def score_layers(cls, huggingface_config: Any) -> ScoreLayers:
        """The pooler and the classifier."""
        pooler = ScoreLayer(("bert.pooler.dense.weight",), "bert.pooler.dense.bias", "Tanh")
        return ScoreLayers("cls", (pooler, ScoreLayer(("classifier.weight",), "classifier.bias")))
