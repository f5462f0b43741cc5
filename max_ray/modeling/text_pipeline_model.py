"""TextPipelineModel: what decoder-only text families share, so that a new one only writes its network.

Ragged layout of a batch of B rows with n_b new tokens each, T in all: row b is tokens [qo_indptr[b], qo_indptr[b + 1]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from max_ray import kernels
from max_ray.driver import upload
from max_ray.errors import ConfigError, ParallelismError
from max_ray.huggingface import head_dim, required
from max_ray.interfaces import KVCacheInputs, ModelInputs, ModelOutputs, RunRow
from max_ray.modeling import PipelineModel
from max_ray.nn.forward_batch import ForwardBatch
from max_ray.nn.rope import RopeConfig

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig

IntArray = npt.NDArray[np.int64]


@dataclass
class RopeLengthInputs(ModelInputs):
    """rope_lengths: int64 [T], for checkpoints whose rope depends on the sequence length (see RopeConfig)."""

    rope_lengths: torch.Tensor | None = None


class TextPipelineModel(PipelineModel):
    """Prepares token inputs, runs the network, and answers from config.json's usual names.

    A family sets `network` in `__init__`: it is called as network(batch) -> logits [N, V] with a ForwardBatch.
    """

    network: Any

    @classmethod
    def calculate_max_seq_len(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> int:
        """`max_length` of the configuration, by default the length that the model's rope was made for (see
        RopeConfig.max_supported_length). Raises ConfigError when more is asked for."""
        supported = cls.rope_config(huggingface_config).max_supported_length
        wanted: int | None = pipeline_config.max_length
        if wanted is not None and wanted > supported:
            raise ConfigError(
                f"max_length={wanted} exceeds what the model supports: {supported} tokens "
                f"(max_position_embeddings and rope scaling in config.json). Use max_length={supported} or less."
            )
        return wanted or supported

    @classmethod
    def check_tensor_parallel(cls, huggingface_config: Any, tp_size: int) -> None:
        """Query heads and the feed-forward width are cut evenly; KV heads are cut or replicated evenly."""
        num_heads = required(huggingface_config, "num_attention_heads")
        num_kv_heads = huggingface_config.get("num_key_value_heads") or num_heads
        width = required(huggingface_config, "intermediate_size")
        check_cut(tp_size, num_heads, num_kv_heads, {"intermediate_size": width})

    @classmethod
    def rope_config(cls, huggingface_config: Any) -> RopeConfig:
        """The model's rope, from config.json."""
        return RopeConfig.from_huggingface(huggingface_config, head_dim(huggingface_config))

    @classmethod
    def prefix_is_reusable(cls, pipeline_config: PipelineConfig, huggingface_config: Any) -> bool:
        """Not where the rope of a prompt's first token depends on the prompt's length (see RopeConfig)."""
        rope = cls.rope_config(huggingface_config)
        if not rope.depends_on_length:
            return True
        return cls.calculate_max_seq_len(pipeline_config, huggingface_config) <= rope.fixed_length

    def prepare_initial_token_inputs(
        self,
        context_batch: Sequence[RunRow],
        kv_cache_inputs: KVCacheInputs | None = None,
        return_n_logits: int = 1,
    ) -> ModelInputs:
        """See PipelineModel. Rows may be TextContexts too: those want their last `return_n_logits` logits."""
        tokens, positions, indptr, logit_indices = ragged_arrays(context_batch, return_n_logits)
        return ModelInputs(
            tokens=self._to_device(tokens),
            positions=self._to_device(positions),
            qo_indptr=self._to_device(indptr),
            logit_indices=self._to_device(logit_indices),
            kv_cache_inputs=kv_cache_inputs,
        )

    def with_rope_lengths(self, inputs: ModelInputs, context_batch: Sequence[RunRow]) -> RopeLengthInputs:
        """Inputs of a rope that depends on the length: a token of the prompt uses that of its whole prompt, a generated
        one the length up to itself, which is the default of following steps."""
        prompts = np.array([row.prompt_length for row in context_batch], dtype=np.int64)
        counts = [len(row.active_tokens) for row in context_batch]
        lengths = torch.maximum(inputs.positions + 1, self._to_device(np.repeat(prompts, counts)))
        return RopeLengthInputs(**vars(inputs), rope_lengths=lengths)

    def forward_batch(self, model_inputs: ModelInputs) -> ForwardBatch:
        """What the network is called with; a family with inputs of its own adds them here."""
        return ForwardBatch.of(model_inputs)

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """See PipelineModel."""
        with torch.inference_mode():
            return ModelOutputs(logits=self.network(self.forward_batch(model_inputs)))

    def prepare_next_token_inputs(self, next_tokens: torch.Tensor, prev_model_inputs: ModelInputs) -> ModelInputs:
        """See PipelineModel. Position of a row's token: its cache length, less what images before it save."""
        kv = prev_model_inputs.kv_cache_inputs
        assert kv is not None, "a following step needs the KV cache"
        num_rows = len(next_tokens)
        assert len(kv.cache_lengths) == num_rows, f"{num_rows} tokens for {len(kv.cache_lengths)} rows"
        positions = kernels.positions(kv.cache_lengths)
        if kv.position_offsets is not None:
            positions = positions + kv.position_offsets
        return ModelInputs(
            tokens=next_tokens,
            positions=positions,
            qo_indptr=torch.arange(num_rows + 1, dtype=torch.int32, device=self.device),
            logit_indices=torch.arange(num_rows, device=self.device),
            kv_cache_inputs=kv,
        )

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return upload(array, self.device)


def ragged_arrays(
    rows: Sequence[RunRow], return_n_logits: int
) -> tuple[IntArray, IntArray, npt.NDArray[np.int32], IntArray]:
    """(tokens [T], positions [T], qo_indptr int32 [B + 1], logit_indices [N]) of the rows' active tokens."""
    lengths = np.array([len(row.active_tokens) for row in rows], dtype=np.int64)
    assert (lengths > 0).all(), "every row of a batch runs at least one token"
    starts = np.array([row.processed_length for row in rows], dtype=np.int64)
    wanted = np.array([getattr(row, "num_logits", return_n_logits) for row in rows], dtype=np.int64)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([row.active_tokens for row in rows])
    positions = spans(starts, lengths)
    wanted = np.minimum(wanted, lengths)
    logit_indices = spans(indptr[1:] - wanted, wanted)
    return tokens.astype(np.int64, copy=False), positions, indptr.astype(np.int32), logit_indices


def spans(starts: IntArray, lengths: IntArray) -> IntArray:
    """The ranges [starts[i], starts[i] + lengths[i]), one after another."""
    ends = np.cumsum(lengths)
    within: IntArray = np.arange(ends[-1], dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
    return within


def check_cut(tp_size: int, num_heads: int, num_kv_heads: int, widths: Mapping[str, int]) -> None:
    """Raises ParallelismError, which names the sizes that work, where `tp_size` ranks cannot cut the query heads or
    one of `widths` (by their names in config.json) evenly, or cut or replicate the KV heads evenly."""

    def culprit(size: int) -> str | None:
        if num_heads % size:
            return f"num_attention_heads={num_heads}"
        for name, width in widths.items():
            if width % size:
                return f"{name}={width}"
        kv_heads_fit = num_kv_heads % size == 0 or size % num_kv_heads == 0
        return None if kv_heads_fit else f"num_key_value_heads={num_kv_heads}"

    wrong = culprit(tp_size)
    if wrong is not None:
        working = [n for n in range(1, min(num_heads, 1024) + 1) if culprit(n) is None]
        raise ParallelismError(
            f"{wrong} cannot be divided over tensor_parallel_size={tp_size}; "
            f"sizes that work: {', '.join(map(str, working))}"
        )
