"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1): the cache holds one latent and one rotated
key a token, for all heads together.

A head's key is [W_uk latent | rope key] and its value W_uv latent. W_uk and W_uv can be absorbed into the query
and the result, so that the heads attend to the latents themselves: see kernels.latent_attention.

Axes: T new tokens, H heads of this rank, L latent width, P width of the part without position, R rotated width, V of a
value head, Q width of the compressed query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from max_ray import kernels
from max_ray.distributed import TPGroup
from max_ray.nn.forward_batch import ForwardBatch
from max_ray.nn.linear import ColumnParallelLinear, Linear, RowParallelLinear, shard_range
from max_ray.nn.module import Module
from max_ray.nn.norm import RMSNorm
from max_ray.weights.parameter import PartSpec

_LATENT_EPS = 1e-6  # of the norms of compressed vectors, whatever config.json says of the others


@dataclass(frozen=True)
class LatentAttentionShape:
    """Sizes of the whole layer, before it is cut over ranks.

    query_rank: Q, None where queries are not compressed. interleaved: pairs of rope, see kernels.apply_rope.
    scale: multiplies q k^T. bias: of the products down to the compressed vectors, and of the output.
    """

    dim: int
    num_heads: int
    query_rank: int | None
    latent_dim: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    interleaved: bool = True
    bias: bool = False


class LatentAttention(Module):
    """Self-attention of one layer: [T, hidden] -> [T, hidden]. Its cache is `kv.keys[layer_index]`, one "head" of
    L + R a token, whole on every rank; `kv.values` is not used. The ranks share the heads."""

    def __init__(self, shape: LatentAttentionShape, layer_index: int, tp: TPGroup, dtype: torch.dtype) -> None:
        self._shape = shape
        self._layer_index = layer_index
        self._on_cpu = tp.device.type == "cpu"
        query_width = shape.num_heads * (shape.plain_dim + shape.rope_dim)
        if shape.query_rank is None:
            self.query = ColumnParallelLinear(shape.dim, query_width, tp, dtype=dtype)
        else:
            self.query_down = Linear(shape.dim, shape.query_rank, shape.bias, dtype=dtype, device=tp.device)
            self.query_norm = RMSNorm(shape.query_rank, _LATENT_EPS, dtype=dtype, device=tp.device)
            self.query = ColumnParallelLinear(shape.query_rank, query_width, tp, dtype=dtype)
        cached_dim = shape.latent_dim + shape.rope_dim
        self.latent_down = Linear(shape.dim, cached_dim, shape.bias, dtype=dtype, device=tp.device)
        self.latent_norm = RMSNorm(shape.latent_dim, _LATENT_EPS, dtype=dtype, device=tp.device)
        self.up = LatentUp(shape, tp, dtype)
        self.out = RowParallelLinear(shape.num_heads * shape.value_dim, shape.dim, tp, bias=shape.bias, dtype=dtype)

    @property
    def waits_for_device(self) -> bool:
        """On a CPU, where the reference implementation may serve, which plans on the host: no tape holds that."""
        return self._on_cpu

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        shape, kv, cos_sin = self._shape, batch.kv, batch.cos_sin
        assert cos_sin is not None, "the network gives the rotation before its layers run"
        cache = kv.keys[self._layer_index]
        q = self._queries(x)
        latent, k_rope = self.latent_down(x).split([shape.latent_dim, shape.rope_dim], dim=-1)  # [T, L], [T, R]
        q_rope, k_rope = kernels.apply_rope(
            q[..., shape.plain_dim :], k_rope.unsqueeze(1), cos_sin, None, interleaved=shape.interleaved
        )
        latent = torch.cat((self.latent_norm(latent), k_rope.squeeze(1)), dim=-1)  # [T, L + R]
        kernels.append_latent(latent, cache, kv.slot_mapping)
        q = torch.cat((q[..., : shape.plain_dim], q_rope), dim=-1)
        attended = kernels.latent_attention(
            q, cache, kv, batch.qo_indptr, up=self.up.heads, scale=shape.scale
        )  # [T, H, V]
        y: torch.Tensor = self.out(attended.flatten(-2))
        return y

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, P + R]."""
        if self._shape.query_rank is not None:
            x = self.query_norm(self.query_down(x))
        q: torch.Tensor = self.query(x)
        return q.view(len(x), -1, self._shape.plain_dim + self._shape.rope_dim)


class LatentUp(Module):
    """W_uk and W_uv of this rank's heads, one weight as in a checkpoint: [H * (P + V), L], key rows before value rows
    in each head."""

    weight: torch.Tensor

    def __init__(self, shape: LatentAttentionShape, tp: TPGroup, dtype: torch.dtype) -> None:
        self._shape = shape
        size = shape.plain_dim + shape.value_dim
        heads, latent_dim = shard_range(shape.num_heads, tp), shape.latent_dim
        spec = PartSpec((shape.num_heads * size, latent_dim), 0, heads.start * size, heads.stop * size, 0)
        self.add_parameter(
            "weight", torch.empty(len(heads) * size, latent_dim, dtype=dtype, device=tp.device), {"": spec}
        )

    @property
    def heads(self) -> torch.Tensor:
        """[H, P + V, L]."""
        return self.weight.view(-1, self._shape.plain_dim + self._shape.value_dim, self._shape.latent_dim)
