"""The tensors that go in and out of a model: one step over a ragged batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class KVCacheInputs:
    """The paged cache as one step sees it. B rows, T new tokens in all; tensors on the model's device.

    keys, values: per layer [num_blocks, page_size, num_kv_heads, head_dim]; updated in place.
    block_tables: int32 [B, max_blocks], padded with 0 past a row's own blocks.
    cache_lengths: int32 [B], tokens of each row in the cache before this step.
    slot_mapping: int64 [T], where each new token goes: block_id * page_size + offset.
    max_kv_length: longest row after this step (host integer).
    position_offsets: int64 [B], what is added to a row's length for the position of its next token; None where the two
        are the same in all rows (see PromptImage).
    plans: what a kernel works out once a step and uses in every layer; empty when a step begins.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    block_tables: torch.Tensor
    cache_lengths: torch.Tensor
    slot_mapping: torch.Tensor
    max_kv_length: int
    page_size: int
    position_offsets: torch.Tensor | None = None
    plans: dict[Any, Any] = field(default_factory=dict)


@dataclass
class ModelInputs:
    """Inputs of one forward pass over a ragged batch; subclass it only for further tensors (images, routing).

    tokens: int64 [T]. positions: int64 [T]. qo_indptr: int32 [B + 1], row b is [qo_indptr[b], qo_indptr[b + 1]).
    logit_indices: int64 [N], the token indices whose logits are wanted, in row order.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    qo_indptr: torch.Tensor
    logit_indices: torch.Tensor
    kv_cache_inputs: KVCacheInputs | None = None


@dataclass(frozen=True)
class ModelOutputs:
    """logits: float32 or the model's dtype, [N, vocab_size] for ModelInputs.logit_indices, whole on every rank."""

    logits: torch.Tensor
    hidden_states: torch.Tensor | None = None
