"""The decoder that most families share: pre-norm layers over one residual stream, each family giving its own layers.

Axes: T new tokens of a ragged batch, N tokens whose logits are wanted, D hidden size, R rotated width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from max_ray import kernels
from max_ray.distributed import TPGroup
from max_ray.nn.embedding import ParallelLMHead, VocabParallelEmbedding
from max_ray.nn.forward_batch import ForwardBatch
from max_ray.nn.module import Module
from max_ray.nn.norm import RMSNorm
from max_ray.nn.rope import RopeConfig, RotaryEmbedding


class TransformerConfig(Protocol):
    """What a family's own configuration tells a Transformer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def rope(self) -> RopeConfig: ...


class TransformerBlock(Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)).

    The sum x + residual is left to the next norm, which fuses it.
    attention: called as attention(x, batch). mlp: called as mlp(x), dense or a mixture of experts.
    """

    def __init__(
        self, config: TransformerConfig, attention: Module, mlp: Module, tp: TPGroup, dtype: torch.dtype
    ) -> None:
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(dim, eps, dtype=dtype, device=tp.device)
        self.attention = attention
        self.mlp_norm = RMSNorm(dim, eps, dtype=dtype, device=tp.device)
        self.mlp = mlp

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [T, D] -> the same; residual is None before the first layer."""
        if residual is None:
            residual = x
            x = self.attention_norm(x)
        else:
            x, residual = self.attention_norm.add_and_norm(x, residual)
        x = self.attention(x, batch)
        x, residual = self.mlp_norm.add_and_norm(x, residual)
        return self.mlp(x), residual


class Transformer(Module):
    """Token ids in, logits out, through layers that are called as a TransformerBlock is.

    Weights are uninitialised until loaded.
    """

    def __init__(
        self, config: TransformerConfig, layers: Sequence[Module], max_length: int, tp: TPGroup, dtype: torch.dtype
    ) -> None:
        dim = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, tp, dtype=dtype)
        self.layers = list(layers)
        self.norm = RMSNorm(dim, config.rms_norm_eps, dtype=dtype, device=tp.device)
        tied_to = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, dim, tp, tied_to=tied_to, dtype=dtype)
        self.rotary = RotaryEmbedding(config.rope, max_length, dtype=dtype, device=tp.device)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits [N, V]; the new keys and values go into `batch.kv`."""
        batch.cos_sin = self.rotary(batch.positions, batch.rope_lengths)  # [T, R], for all layers
        return self.decode(self.embed_tokens(batch.tokens), batch)

    def decode(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Embedded tokens x [T, D] -> logits [N, V]."""
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, batch)
        x = kernels.gather_rows(x, batch.logit_indices)  # [N, D]
        if residual is None:
            x = self.norm(x)
        else:
            x, _ = self.norm.add_and_norm(x, kernels.gather_rows(residual, batch.logit_indices))
        logits: torch.Tensor = self.lm_head(x)
        return logits
