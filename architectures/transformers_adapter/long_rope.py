"""Networks of `transformers` with a rope of the kind "longrope" (Phi-3), to their full length.

Such a rope has two sets of frequencies, for sequences up to the length of the pre-training and for longer ones.
`transformers` takes one set for a whole batch, by its longest position; here each token takes that of its own sequence,
which is what `transformers` gives for the request alone: see max_ray/nn/rope.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

KIND = "longrope"


def pretraining_length(config: Any) -> int | None:
    """Tokens up to which the first set holds, where the whole network has one such rope; None for others."""
    rope = getattr(config, "rope_parameters", None) or {}
    length = rope.get("original_max_position_embeddings")
    return int(length) if rope.get("rope_type") == KIND and length else None


class LongRope:
    """In place of the forward of one rotary module: (x, position_ids [1, T]) -> what the module's own code gives.

    lengths: int64 [T], of each token's sequence; None for the length up to the token itself.
    """

    def __init__(self, rotary: Any) -> None:
        self.lengths: torch.Tensor | None = None
        self._rotary = rotary
        self._own = inspect.unwrap(type(rotary).forward)  # without transformers' choice for the batch
        self._pretraining = int(rotary.config.rope_parameters["original_max_position_embeddings"])
        self._short = rotary.inv_freq.clone()
        long, _ = ROPE_INIT_FUNCTIONS[KIND](rotary.config, self._short.device, seq_len=self._pretraining + 1)
        self._long = long.to(self._short)

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        lengths = position_ids + 1 if self.lengths is None else self.lengths[None]
        is_long = (lengths > self._pretraining).unsqueeze(-1)
        pairs = zip(self._turned(self._long, x, position_ids), self._turned(self._short, x, position_ids), strict=True)
        return tuple(torch.where(is_long, long, short) for long, short in pairs)

    def _turned(self, inv_freq: torch.Tensor, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        self._rotary.inv_freq = inv_freq
        return self._own(self._rotary, x, position_ids)


def place_long_ropes(network: Any) -> list[LongRope]:
    """Gives every rotary module of this kind its LongRope; the modules' buffers are filled already."""
    ropes = []
    for module in network.modules():
        if getattr(module, "rope_type", None) == KIND and isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            module.forward = LongRope(module)
            ropes.append(module.forward)
    return ropes
