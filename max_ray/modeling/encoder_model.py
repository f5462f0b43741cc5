"""EncoderModel: the PipelineModel of a bidirectional encoder that gives its numbers, its network and its weight names.

class MyModel(EncoderModel):
    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> MyConfig:
        return MyConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> MyNetwork:
        return MyNetwork(self.config_of(self.huggingface_config), self.tp, dtype)

The network is called with tokens [T], positions [T] and the groups of equal rows, and gives hidden states [T, D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from max_ray.driver import upload
from max_ray.errors import ConfigError
from max_ray.interfaces import KVCacheInputs, KVCacheParams, ModelInputs, ModelOutputs, RunRow
from max_ray.modeling.network_model import NetworkModel
from max_ray.modeling.text_pipeline_model import IntArray, check_cut, ragged_arrays
from max_ray.nn.encoder import EqualRows, equal_rows

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig


class EncoderConfig(Protocol):
    """What a family's own configuration class tells EncoderModel. Counts are of the whole model.

    max_length: tokens of a text that the model has positions for. widths: see DecoderConfig.
    """

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def widths(self) -> Mapping[str, int]: ...


@dataclass
class EncoderInputs(ModelInputs):
    """groups: the rows of equal length, which lie side by side."""

    groups: list[EqualRows] = field(default_factory=list)


class EncoderModel(NetworkModel[EncoderConfig]):
    """A NetworkModel of an encoder, whose one step gives hidden states."""

    @classmethod
    def calculate_max_seq_len(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> int:
        """`max_length` of the configuration, by default all that the model has positions for. Raises ConfigError when
        more is asked for."""
        supported, wanted = cls.config_of(huggingface_config).max_length, pipeline_config.max_length
        if wanted is not None and wanted > supported:
            raise ConfigError(
                f"max_length={wanted} exceeds what the model has positions for: {supported} tokens. "
                f"Use max_length={supported} or less."
            )
        return wanted or supported

    @classmethod
    def get_kv_params(
        cls, pipeline_config: PipelineConfig, huggingface_config: Any, encoding: Any, tp_size: int = 1
    ) -> KVCacheParams:
        """No cache; the head counts are those of a rank."""
        config = cls.config_of(huggingface_config)
        return KVCacheParams(
            dtype=encoding.cache_dtype,
            num_layers=0,
            num_kv_heads=max(1, config.num_heads // tp_size),
            head_dim=config.hidden_size // config.num_heads,
            page_size=pipeline_config.kv_cache_page_size,
        )

    @classmethod
    def check_tensor_parallel(cls, huggingface_config: Any, tp_size: int) -> None:
        """See `check_cut`."""
        config = cls.config_of(huggingface_config)
        check_cut(tp_size, config.num_heads, config.num_heads, config.widths)

    @classmethod
    def check_settings(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> None:
        """See PipelineModel; and ConfigError for a config.json that the family does not cover."""
        super().check_settings(pipeline_config, huggingface_config)
        cls.config_of(huggingface_config)

    def positions_of(self, tokens: IntArray, positions: IntArray, indptr: IntArray) -> IntArray:
        """Numbers of the rows of the position table: by default each token's place in its row, from 0.

        tokens, positions [T] of all rows; indptr [B + 1]: row b is [indptr[b], indptr[b + 1]).
        """
        return positions

    def prepare_initial_token_inputs(
        self,
        context_batch: Sequence[RunRow],
        kv_cache_inputs: KVCacheInputs | None = None,
        return_n_logits: int = 1,
    ) -> EncoderInputs:
        """Inputs of the one step there is. Rows come in the order of their lengths."""
        assert kv_cache_inputs is None, "an encoder has no KV cache"
        tokens, positions, indptr, wanted = ragged_arrays(context_batch, return_n_logits)
        positions = self.positions_of(tokens, positions, indptr.astype(np.int64))
        return EncoderInputs(
            tokens=upload(tokens, self.device),
            positions=upload(positions, self.device),
            qo_indptr=upload(indptr, self.device),
            logit_indices=upload(wanted, self.device),
            groups=equal_rows(np.diff(indptr).tolist()),
        )

    def prepare_next_token_inputs(self, next_tokens: torch.Tensor, prev_model_inputs: ModelInputs) -> ModelInputs:
        raise AssertionError("an encoder generates nothing: there is no next token")

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """hidden_states [T, D] of all tokens; they stand in for the logits, which there are none of."""
        assert isinstance(model_inputs, EncoderInputs), "inputs of prepare_initial_token_inputs"
        with torch.inference_mode():
            hidden = self.network(model_inputs.tokens, model_inputs.positions, model_inputs.groups)
        return ModelOutputs(logits=hidden, hidden_states=hidden)


def positions_after_padding(tokens: IntArray, indptr: IntArray, padding_id: int) -> IntArray:
    """Positions of the RoBERTa kind (Liu et al. 2019): from padding_id + 1 on, where a padding token counts nothing and
    has the position padding_id itself."""
    counts = (tokens != padding_id).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(counts)])
    within = before[1:] - np.repeat(before[indptr[:-1]], np.diff(indptr))
    result: IntArray = within * counts + padding_id
    return result
