"""Grouped-query attention over the paged KV cache; the cache comes in as an argument, the layer keeps none.

Axes: T new tokens of a ragged batch, H query heads and KVH key/value heads of this rank, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from max_ray import kernels
from max_ray.distributed import TPGroup
from max_ray.interfaces import KVCacheInputs
from max_ray.nn.encoder import EqualRows, bidirectional_attention
from max_ray.nn.forward_batch import ForwardBatch
from max_ray.nn.linear import QKVParallelLinear, RowParallelLinear, shard_range
from max_ray.nn.module import Module
from max_ray.weights.parameter import PartSpec


@dataclass(slots=True)
class TwoWayRows(KVCacheInputs):
    """In place of a cache, for whole rows whose tokens see later ones, too: nothing is kept.

    groups: the rows of equal length, which lie side by side.
    """

    groups: list[EqualRows] = field(default_factory=list)


class Attention(Module):
    """Self-attention of one layer: [T, hidden] -> [T, hidden].

    layer_index: which of `kv.keys` and `kv.values` are this layer's. scale: of q k^T, 1 / sqrt(head_dim) by default.
    bias: of the fused q, k, v product; out_bias: of the output product, by default as `bias`.
    q_norm, k_norm: layers that map each query and key head [T, H, D] -> the same, before the rotation.
    sinks: whether each head has a learned score beside those of the keys (see kernels.paged_attention).
    sliding_window: a token sees itself and the `sliding_window - 1` tokens before it (of TwoWayRows, and after it);
    None: all.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_index: int,
        tp: TPGroup,
        *,
        bias: bool = False,
        out_bias: bool | None = None,
        scale: float | None = None,
        q_norm: Module | None = None,
        k_norm: Module | None = None,
        sliding_window: int | None = None,
        sinks: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        out_bias = bias if out_bias is None else out_bias
        self.qkv = QKVParallelLinear(dim, num_heads, num_kv_heads, head_dim, tp, bias=bias, dtype=dtype)
        self.out = RowParallelLinear(num_heads * head_dim, dim, tp, bias=out_bias, dtype=dtype)
        self.q_norm, self.k_norm = q_norm, k_norm
        self._split = [n * head_dim for n in (self.qkv.num_heads, self.qkv.num_kv_heads, self.qkv.num_kv_heads)]
        self._head_dim = head_dim
        self._layer_index = layer_index
        self._scale = head_dim**-0.5 if scale is None else scale
        self._sliding_window = sliding_window
        self.sinks: torch.Tensor | None = None
        if sinks:
            heads = shard_range(num_heads, tp)
            spec = PartSpec((num_heads,), 0, heads.start, heads.stop, 0)
            self.add_parameter("sinks", torch.empty(len(heads), dtype=dtype, device=tp.device), {"": spec})

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        kv, cos_sin = batch.kv, batch.cos_sin
        assert cos_sin is not None, "the network gives the rotation before its layers run"
        q, k, v = (part.unflatten(-1, (-1, self._head_dim)) for part in self.qkv(x).split(self._split, dim=-1))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if isinstance(kv, TwoWayRows):
            return self._two_ways(q, k, v, cos_sin, kv.groups)
        keys, values = kv.keys[self._layer_index], kv.values[self._layer_index]
        q = kernels.rope_and_append(q, k, v, keys, values, cos_sin, None, kv.slot_mapping)  # [T, H, D]
        attended = kernels.paged_attention(
            q,
            keys,
            values,
            kv,
            batch.qo_indptr,
            scale=self._scale,
            sliding_window=self._sliding_window,
            sinks=self.sinks,
        )
        y: torch.Tensor = self.out(attended.flatten(-2))
        return y

    def _two_ways(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor, groups: Sequence[EqualRows]
    ) -> torch.Tensor:
        """The layer where tokens see later ones: q [T, H, D], k and v [T, KVH, D] -> [T, hidden]."""
        assert self.sinks is None, "sinks are for rows with a cache"
        q, k = kernels.apply_rope(q, k, cos_sin, None)
        shared = q.shape[1] // k.shape[1]
        k, v = (heads.repeat_interleave(shared, dim=1) for heads in (k, v))
        reach = None if self._sliding_window is None else self._sliding_window - 1
        y: torch.Tensor = self.out(bidirectional_attention(q, k, v, groups, reach=reach, scale=self._scale).flatten(-2))
        return y
