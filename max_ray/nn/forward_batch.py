"""ForwardBatch: one step over a ragged batch, as the layers of a network see it.

Layers take it as one argument, so that a further tensor of a step (adapter ids, a tree of drafts) is a field here and
changes no signature. In a recorded decode step every tensor lies in a buffer that the recording reads again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from max_ray.interfaces import KVCacheInputs, ModelInputs


@dataclass(slots=True)
class ForwardBatch:
    """B rows, T new tokens in all, N tokens whose logits are wanted.

    Attributes:
        tokens: int64 [T].
        positions: int64 [T].
        qo_indptr: int32 [B + 1], row b is tokens [qo_indptr[b], qo_indptr[b + 1]).
        logit_indices: int64 [N], in row order.
        kv: the paged cache as this step sees it.
        rope_lengths: int64 [T], where the rope depends on the sequence length (see RotaryEmbedding), else None.
        cos_sin: [T, R], the rotation of each new token; the network sets it before its layers run.
        images: what a network with a vision tower needs of the images in this step, else None.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    qo_indptr: torch.Tensor
    logit_indices: torch.Tensor
    kv: KVCacheInputs
    rope_lengths: torch.Tensor | None = None
    cos_sin: torch.Tensor | None = None
    images: Any = None

    @classmethod
    def of(cls, inputs: ModelInputs, images: Any = None) -> ForwardBatch:
        """The batch of a model's inputs.

        Args:
            inputs: ModelInputs or a subclass; `rope_lengths` is taken over where there is one.
            images: see above.
        """
        assert inputs.kv_cache_inputs is not None, "a decoder runs with a KV cache"
        return cls(
            tokens=inputs.tokens,
            positions=inputs.positions,
            qo_indptr=inputs.qo_indptr,
            logit_indices=inputs.logit_indices,
            kv=inputs.kv_cache_inputs,
            rope_lengths=getattr(inputs, "rope_lengths", None),
            images=images,
        )

    def rotated(self, cos_sin: torch.Tensor) -> ForwardBatch:
        """The same step for layers of this rotation, [T, R]."""
        return replace(self, cos_sin=cos_sin)
