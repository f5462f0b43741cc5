"""XLMRobertaEncoder: the XLM-RoBERTa network as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.xlm_roberta.model_config import XLMRobertaConfig
from architectures.xlm_roberta.weight_adapters import safetensors_name_map
from architectures.xlm_roberta.xlm_roberta import XLMRoberta
from max_ray.modeling.encoder_model import EncoderModel, positions_after_padding
from max_ray.modeling.score_layers import ScoreLayer, ScoreLayers, check_one_label
from max_ray.modeling.text_pipeline_model import IntArray


class XLMRobertaEncoder(EncoderModel):
    """One rank of an XLM-RoBERTa."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> XLMRobertaConfig:
        return XLMRobertaConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> XLMRoberta:
        return XLMRoberta(self.config_of(self.huggingface_config), self.tp, dtype)

    def positions_of(self, tokens: IntArray, positions: IntArray, indptr: IntArray) -> IntArray:
        """See `positions_after_padding`."""
        return positions_after_padding(tokens, indptr, self.config_of(self.huggingface_config).padding_id)


class XLMRobertaScorer(XLMRobertaEncoder):
    """One rank of an XLM-RoBERTa that scores pairs. All tokens have the type 0."""

    @classmethod
    def check_settings(cls, pipeline_config: Any, huggingface_config: Any) -> None:
        """See EncoderModel; and ConfigError for more labels than one."""
        super().check_settings(pipeline_config, huggingface_config)
        check_one_label(huggingface_config)

    @classmethod
    def score_layers(cls, huggingface_config: Any) -> ScoreLayers:
        """The two layers of the classifier."""
        dense = ScoreLayer(("classifier.dense.weight",), "classifier.dense.bias", "Tanh")
        return ScoreLayers("cls", (dense, ScoreLayer(("classifier.out_proj.weight",), "classifier.out_proj.bias")))
