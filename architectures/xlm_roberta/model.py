"""XLMRobertaEncoder: the XLM-RoBERTa network, with learned positions or with a rope, as the pipeline sees it."""

from __future__ import annotations

from typing import Any

import torch

from architectures.xlm_roberta.model_config import RotaryConfig, XLMRobertaConfig, is_rotary
from architectures.xlm_roberta.weight_adapters import safetensors_name_map
from architectures.xlm_roberta.xlm_roberta import RotaryXLMRoberta, XLMRoberta
from max_ray.errors import ParallelismError
from max_ray.log import get_logger
from max_ray.modeling.encoder_model import EncoderModel, positions_after_padding
from max_ray.modeling.score_layers import ScoreLayer, ScoreLayers, check_one_label
from max_ray.modeling.text_pipeline_model import IntArray

_LOG = get_logger(__name__)


class XLMRobertaEncoder(EncoderModel):
    """One rank of an XLM-RoBERTa."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> XLMRobertaConfig | RotaryConfig:
        kind = RotaryConfig if is_rotary(huggingface_config) else XLMRobertaConfig
        return kind.from_huggingface(huggingface_config)

    @classmethod
    def check_tensor_parallel(cls, huggingface_config: Any, tp_size: int) -> None:
        """See `check_cut`; with a rope one device only, as its fused products are not cut over ranks."""
        if tp_size > 1 and is_rotary(huggingface_config):
            raise ParallelismError(
                f"An XLM-RoBERTa with a rope runs on one device only, not on tensor_parallel_size={tp_size}."
            )
        super().check_tensor_parallel(huggingface_config, tp_size)

    def build_network(self, max_length: int, dtype: torch.dtype) -> XLMRoberta | RotaryXLMRoberta:
        config = self.config_of(self.huggingface_config)
        if isinstance(config, XLMRobertaConfig):
            return XLMRoberta(config, self.tp, dtype)
        if self.huggingface_config.get("lora_adaptations"):
            _LOG.warning(
                "The checkpoint's adapters for tasks (LoRA) are not applied: vectors are those without a task."
            )
        return RotaryXLMRoberta(config, max_length, self.tp, dtype)

    def positions_of(self, tokens: IntArray, positions: IntArray, indptr: IntArray) -> IntArray:
        """See `positions_after_padding`; with a rope a token's place in its row."""
        config = self.config_of(self.huggingface_config)
        if isinstance(config, RotaryConfig):
            return positions
        return positions_after_padding(tokens, indptr, config.padding_id)


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
