"""The decoder that most families share: pre-norm layers over one residual stream, each family giving its own layers.

Axes: T new tokens of a ragged batch, N tokens whose logits are wanted, D hidden size, R rotated width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from max_ray import kernels
from max_ray.distributed import TPGroup
from max_ray.interfaces import KVCacheInputs
from max_ray.nn.embedding import ParallelLMHead, VocabParallelEmbedding
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
    attention: called as attention(x, cos_sin, kv, qo_indptr). mlp: called as mlp(x), dense or a mixture of experts.
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
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        cos_sin: torch.Tensor,
        kv: KVCacheInputs,
        qo_indptr: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [T, D] -> the same; residual is None before the first layer."""
        if residual is None:
            residual = x
            x = self.attention_norm(x)
        else:
            x, residual = self.attention_norm.add_and_norm(x, residual)
        x = self.attention(x, cos_sin, kv, qo_indptr)
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

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        qo_indptr: torch.Tensor,
        logit_indices: torch.Tensor,
        kv: KVCacheInputs,
        rope_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens, positions [T], logit_indices [N] -> logits [N, V]; the new keys and values go into `kv`.

        rope_lengths: [T], where the rope depends on the sequence length (see RotaryEmbedding).
        """
        cos_sin = self.rotary(positions, rope_lengths)  # [T, R], for all layers
        return self.decode(self.embed_tokens(tokens), cos_sin, qo_indptr, logit_indices, kv)

    def decode(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor,
        qo_indptr: torch.Tensor,
        logit_indices: torch.Tensor,
        kv: KVCacheInputs,
    ) -> torch.Tensor:
        """Embedded tokens x [T, D] and their rotation [T, R] -> logits [N, V]."""
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, cos_sin, kv, qo_indptr)
        x = kernels.gather_rows(x, logit_indices)  # [N, D]
        if residual is None:
            x = self.norm(x)
        else:
            x, _ = self.norm.add_and_norm(x, kernels.gather_rows(residual, logit_indices))
        logits: torch.Tensor = self.lm_head(x)
        return logits
