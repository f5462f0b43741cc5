"""Layers of bidirectional encoders (Devlin et al. 2018, BERT), over a ragged batch without padding and without a cache.

Axes: T tokens of B rows, laid one after another in the order of their lengths; D hidden size; H heads of this rank, d
head_dim. Rows of equal length are neighbours then, so a group of them is a view [rows, length, H, d], and each group is
one call of torch's attention: no token attends to another row, and none is padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from max_ray.distributed import TPGroup
from max_ray.driver import DeviceLike, as_torch_device
from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.nn.activation import activation
from max_ray.nn.embedding import VocabParallelEmbedding
from max_ray.nn.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from max_ray.nn.module import Module

LOCAL_CHUNK = 512
"""Queries of a local layer that attend together: their keys are this many and the window on either side."""


def hidden_and_heads(huggingface_config: Any) -> tuple[int, int]:
    """(hidden_size, num_attention_heads). Raises ConfigError where the one is no multiple of the other."""
    hidden_size, num_heads = (required(huggingface_config, n) for n in ("hidden_size", "num_attention_heads"))
    if hidden_size % num_heads:
        raise ConfigError(f"config.json: hidden_size={hidden_size} is no multiple of num_attention_heads={num_heads}.")
    return hidden_size, num_heads


@dataclass(frozen=True)
class EqualRows:
    """`num_rows` rows of `length` tokens each, from token `start` on."""

    start: int
    num_rows: int
    length: int

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, d] -> [num_rows, H, length, d], no copy."""
        tokens = x[self.start : self.start + self.num_rows * self.length]
        return tokens.view(self.num_rows, self.length, *x.shape[1:]).transpose(1, 2)


def equal_rows(lengths: Sequence[int]) -> list[EqualRows]:
    """The groups of neighbouring rows of equal length."""
    groups, start = [], 0
    for length, rows in groupby(lengths):
        group = EqualRows(start, len(list(rows)), length)
        groups.append(group)
        start += group.num_rows * length
    return groups


def bidirectional_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: Sequence[EqualRows],
    *,
    reach: int | None = None,
    biases: Mapping[int, torch.Tensor] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T + bias) v within each row: [T, H, d] -> [T, H, d]. scale: 1 / sqrt(d) by default.

    reach: a token sees those at most so far from it, on either side; None: its whole row. biases: [H, length, length]
    by length of a row, added to the scores; not together with `reach`.
    """
    assert reach is None or biases is None, "local layers with a bias on their scores are not there"
    out = torch.empty_like(q)
    for group in groups:
        queries, keys, values = group.view(q), group.view(k), group.view(v)
        if reach is not None and reach < group.length - 1:
            attended = _local_attention(queries, keys, values, reach, scale)
        else:
            bias = None if biases is None else biases[group.length].expand(group.num_rows, -1, -1, -1)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
        group.view(out).copy_(attended)
    return out


def _local_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reach: int, scale: float | None
) -> torch.Tensor:
    """[rows, H, length, d] -> the same, chunk by chunk of the queries, so that work and memory grow with the length
    and not with its square."""
    length, chunks = q.shape[2], []
    for start in range(0, length, LOCAL_CHUNK):
        stop = min(length, start + LOCAL_CHUNK)
        first, end = max(0, start - reach), min(length, stop + reach)
        near = torch.arange(start, stop, device=q.device).unsqueeze(-1) - torch.arange(first, end, device=q.device)
        keys, values = k[:, :, first:end], v[:, :, first:end]
        mask = near.abs() <= reach
        queries = q[:, :, start:stop]
        chunks.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale))
    return torch.cat(chunks, dim=2)


class LayerNorm(Module):
    """Ba et al. 2016, over D; whole on every rank. bias: whether something is added after the scaling."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, dim: int, eps: float, *, bias: bool = True, dtype: torch.dtype = torch.float32, device: DeviceLike = "cpu"
    ) -> None:
        self._eps = eps
        place = as_torch_device(device)
        self.add_parameter("weight", torch.ones(dim, dtype=dtype, device=place))
        self.bias = None
        if bias:
            self.add_parameter("bias", torch.zeros(dim, dtype=dtype, device=place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self._eps)


class Table(Module):
    """Learned rows [N, D] by number (of a position, of a token type); whole on every rank."""

    weight: torch.Tensor

    def __init__(
        self, num_rows: int, dim: int, *, dtype: torch.dtype = torch.float32, device: DeviceLike = "cpu"
    ) -> None:
        self.add_parameter("weight", torch.empty(num_rows, dim, dtype=dtype, device=as_torch_device(device)))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return F.embedding(numbers, self.weight)


class EncoderEmbedding(Module):
    """norm(word + position + token type): int64 [T] -> [T, D]. Without `types` every token has the type 0.

    num_token_types: rows of the table of types; 0 where the family has none.
    """

    def __init__(
        self,
        vocab_size: int,
        num_positions: int,
        num_token_types: int,
        dim: int,
        eps: float,
        tp: TPGroup,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.words = VocabParallelEmbedding(vocab_size, dim, tp, dtype=dtype)
        self.positions = Table(num_positions, dim, dtype=dtype, device=tp.device)
        self.types = Table(num_token_types, dim, dtype=dtype, device=tp.device) if num_token_types else None
        self.norm = LayerNorm(dim, eps, dtype=dtype, device=tp.device)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        x = self.words(tokens)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        embedded: torch.Tensor = self.norm(x + self.positions(positions))
        return embedded


def types_of_pairs(tokens: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
    """The types of rows `[CLS] a [SEP] b [SEP]`: 1 behind the first separator, which is the row's last token, else 0.

    Args:
        tokens: int64 [T].
        groups: The rows.

    Returns:
        int64 [T].
    """
    types = torch.empty_like(tokens)
    for group in groups:
        span = slice(group.start, group.start + group.num_rows * group.length)
        rows = tokens[span].view(group.num_rows, group.length)
        is_separator = (rows == rows[:, -1:]).long()
        types[span] = (is_separator.cumsum(1) - is_separator).clamp(max=1).flatten()
    return types


class EncoderAttention(Module):
    """Self-attention of one layer without a cache: [T, D] -> [T, D]; every product has a bias."""

    def __init__(self, dim: int, num_heads: int, tp: TPGroup, *, dtype: torch.dtype = torch.float32) -> None:
        self._head_dim = dim // num_heads
        self.qkv = QKVParallelLinear(dim, num_heads, num_heads, self._head_dim, tp, bias=True, dtype=dtype)
        self.out = RowParallelLinear(dim, dim, tp, bias=True, dtype=dtype)

    def forward(
        self, x: torch.Tensor, groups: Sequence[EqualRows], biases: Mapping[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """biases: see bidirectional_attention."""
        q, k, v = (part.unflatten(-1, (-1, self._head_dim)) for part in self.qkv(x).chunk(3, dim=-1))
        y: torch.Tensor = self.out(bidirectional_attention(q, k, v, groups, biases=biases).flatten(-2))
        return y


class FeedForward(Module):
    """down(act(up(x))), with biases: [T, D] -> [T, D]."""

    def __init__(self, dim: int, hidden_dim: int, act: str, tp: TPGroup, *, dtype: torch.dtype = torch.float32) -> None:
        self._act = activation(act)
        self.up = ColumnParallelLinear(dim, hidden_dim, tp, bias=True, dtype=dtype)
        self.down = RowParallelLinear(hidden_dim, dim, tp, bias=True, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self._act(self.up(x)))
        return y


class PostNormConfig(Protocol):
    """The numbers of an encoder of the BERT kind. num_positions: rows of the position table. num_token_types: see
    EncoderEmbedding."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_positions(self) -> int: ...
    @property
    def num_token_types(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def activation(self) -> str: ...


class PostNormEncoder(Module):
    """Token ids in, hidden states out, through post-norm layers. Weights are uninitialised until loaded."""

    def __init__(self, config: PostNormConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.embed_tokens = EncoderEmbedding(
            config.vocab_size, config.num_positions, config.num_token_types, dim, eps, tp, dtype=dtype
        )
        self.layers = [
            PostNormBlock(dim, config.num_heads, config.intermediate_size, config.activation, eps, tp, dtype=dtype)
            for _ in range(config.num_layers)
        ]

    def biases(self, groups: Sequence[EqualRows]) -> Mapping[int, torch.Tensor] | None:
        """What all layers add to the scores, see bidirectional_attention: by default nothing."""
        return None

    def token_types(self, tokens: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor | None:
        """int64 [T], the type of each token; None where all are of type 0."""
        return None

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        """tokens, positions [T] -> [T, D]."""
        x: torch.Tensor = self.embed_tokens(tokens, positions, self.token_types(tokens, groups))
        biases = self.biases(groups)
        for layer in self.layers:
            x = layer(x, groups, biases)
        return x


class PostNormBlock(Module):
    """One encoder layer of the BERT kind: norm(x + attention(x)), then norm(x + feed_forward(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        act: str,
        eps: float,
        tp: TPGroup,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.attention = EncoderAttention(dim, num_heads, tp, dtype=dtype)
        self.attention_norm = LayerNorm(dim, eps, dtype=dtype, device=tp.device)
        self.mlp = FeedForward(dim, hidden_dim, act, tp, dtype=dtype)
        self.mlp_norm = LayerNorm(dim, eps, dtype=dtype, device=tp.device)

    def forward(
        self, x: torch.Tensor, groups: Sequence[EqualRows], biases: Mapping[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        x = self.attention_norm(x + self.attention(x, groups, biases))
        y: torch.Tensor = self.mlp_norm(x + self.mlp(x))
        return y
