"""CausalEmbedder: a decoder-only family as an embedder: the hidden states of its tokens, without head and KV cache.

class MyEmbedder(CausalEmbedder, MyModel):
    def build_network(self, max_length: int, dtype: torch.dtype) -> MyNetwork:
        return without_head(super().build_network(max_length, dtype))

The family's attention layers write keys and values and read them again in the same step, so they get a scratch cache of
one layer, as long as the step, which all layers use in turn: nothing outlives the step. Where tokens see later ones
(`sees_both_ways`) there is no cache at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from max_ray.driver import upload
from max_ray.interfaces import KVCacheInputs, KVCacheParams, ModelInputs, ModelOutputs, RunRow
from max_ray.modeling.causal_lm import CausalLMModel
from max_ray.modeling.text_pipeline_model import spans
from max_ray.nn.attention import TwoWayRows
from max_ray.nn.encoder import equal_rows
from max_ray.nn.module import Module

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig


NetworkT = TypeVar("NetworkT", bound=Module)


class NoHead(Module):
    """In place of the output head: hidden states pass through."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def without_head(network: NetworkT) -> NetworkT:
    """The network whose attribute `lm_head`, which gets the normalised hidden states of `logit_indices`, gives them
    back as they are; it has no weights to load then."""
    assert isinstance(vars(network).get("lm_head"), Module), "a decoder's network ends with its head"
    vars(network)["lm_head"] = NoHead()
    return network


class CausalEmbedder(CausalLMModel):
    """Goes before the family's own model class among the bases; its table of names must drop the head's weights."""

    @classmethod
    def default_pooling(cls) -> str:
        """The last token: the only one that has seen the whole text."""
        return "lasttoken"

    @classmethod
    def sees_both_ways(cls, huggingface_config: Any) -> bool:
        """Whether each token sees the whole text, as an encoder's does; by default none does."""
        return False

    @classmethod
    def get_kv_params(
        cls, pipeline_config: PipelineConfig, huggingface_config: Any, encoding: Any, tp_size: int = 1
    ) -> KVCacheParams:
        """No cache; the head counts are those of a rank."""
        params = super().get_kv_params(pipeline_config, huggingface_config, encoding, tp_size)
        return KVCacheParams(params.dtype, 0, params.num_kv_heads, params.head_dim, params.page_size)

    @classmethod
    def prefix_is_reusable(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> bool:
        """There is no cache to find a prefix in."""
        return True

    def prepare_initial_token_inputs(
        self,
        context_batch: Sequence[RunRow],
        kv_cache_inputs: KVCacheInputs | None = None,
        return_n_logits: int = 1,
    ) -> ModelInputs:
        """Inputs of the one step there is, with a scratch cache."""
        assert kv_cache_inputs is None, "an embedder makes its own scratch cache"
        lengths = np.array([len(row.active_tokens) for row in context_batch], dtype=np.int64)
        scratch = self._two_ways(lengths) if self._sees_both_ways else self._scratch(lengths)
        return super().prepare_initial_token_inputs(context_batch, scratch, return_n_logits)

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """hidden_states [N, D] of the tokens `logit_indices`; they stand in for the logits, which there are none of."""
        hidden = super().execute(model_inputs).logits
        return ModelOutputs(logits=hidden, hidden_states=hidden)

    @cached_property
    def _sees_both_ways(self) -> bool:
        return self.sees_both_ways(self.huggingface_config)

    def _two_ways(self, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> TwoWayRows:
        """Rows come in the order of their lengths."""
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        return TwoWayRows(
            keys=[],
            values=[],
            block_tables=empty,
            cache_lengths=torch.zeros(len(lengths), dtype=torch.int32, device=self.device),
            slot_mapping=empty,
            max_kv_length=int(lengths.max()),
            page_size=self._decoder_params.page_size,
            groups=equal_rows(lengths.tolist()),
        )

    @cached_property
    def _decoder_params(self) -> KVCacheParams:
        """The cache that the family's layers expect."""
        size = self.tp.size
        return super().get_kv_params(self.pipeline_config, self.huggingface_config, self.encoding, size)

    def _scratch(self, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> KVCacheInputs:
        """Row b has blocks of its own, one after another: ceil(lengths[b] / page_size) of them."""
        params = self._decoder_params
        counts = -(-lengths // params.page_size)
        firsts, places = np.cumsum(counts) - counts, np.arange(counts.max())
        tables = np.where(places < counts[:, None], firsts[:, None] + places, 0).astype(np.int32)
        slots = spans(firsts * params.page_size, lengths)
        shape = (int(counts.sum()), params.page_size, params.num_kv_heads)
        dtype = getattr(torch, params.dtype)
        keys = torch.zeros(*shape, params.head_dim, dtype=dtype, device=self.device)
        values = torch.zeros(*shape, params.value_head_dim, dtype=dtype, device=self.device)
        return KVCacheInputs(
            keys=[keys] * params.num_layers,
            values=[values] * params.num_layers,
            block_tables=upload(tables, self.device),
            cache_lengths=torch.zeros(len(lengths), dtype=torch.int32, device=self.device),
            slot_mapping=upload(slots, self.device),
            max_kv_length=int(lengths.max()),
            page_size=params.page_size,
        )
