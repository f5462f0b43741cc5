"""The MPNet network (Song et al. 2020): a BERT whose attention scores get a bias by the distance of two tokens, the
same in all layers (buckets as in T5: Raffel et al. 2019).

Axes: H heads of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from architectures.mpnet.model_config import NUM_BUCKETS, MPNetConfig
from max_ray.distributed import TPGroup
from max_ray.nn import Module
from max_ray.nn.encoder import EqualRows, PostNormEncoder
from max_ray.nn.linear import shard_range
from max_ray.weights.parameter import PartSpec

_MAX_DISTANCE = 128
"""Distances beyond it share a bucket."""


class RelativeBias(Module):
    """A learned number for each bucket of distances and each head; the ranks share out the heads."""

    weight: torch.Tensor

    def __init__(self, num_heads: int, tp: TPGroup, dtype: torch.dtype) -> None:
        heads = shard_range(num_heads, tp)
        part = PartSpec((NUM_BUCKETS, num_heads), 1, heads.start, heads.stop, 0)
        self.add_parameter("weight", torch.empty(NUM_BUCKETS, len(heads), dtype=dtype, device=tp.device), {"": part})

    def forward(self, length: int) -> torch.Tensor:
        """[H, length, length]: what is added to the score of a query (axis 1) with a key (axis 2)."""
        places = torch.arange(length, device=self.weight.device)
        buckets = distance_buckets(places.unsqueeze(0) - places.unsqueeze(1))
        return self.weight[buckets].permute(2, 0, 1).contiguous()


def distance_buckets(distances: torch.Tensor) -> torch.Tensor:
    """The bucket of key minus query: half of them for keys behind the query; of each half, half for one distance each
    and the rest in logarithmic steps up to _MAX_DISTANCE."""
    half = NUM_BUCKETS // 2
    exact = half // 2
    far = distances.abs()
    steps = torch.log(far.clamp(min=1).float() / exact) / math.log(_MAX_DISTANCE / exact) * (half - exact)
    coarse = (exact + steps.long()).clamp(max=half - 1)
    return torch.where(far < exact, far, coarse) + (distances > 0) * half


class MPNet(PostNormEncoder):
    """Token ids in, hidden states out: see PostNormEncoder."""

    def __init__(self, config: MPNetConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__(config, tp, dtype)
        self.relative_bias = RelativeBias(config.num_heads, tp, dtype)

    def biases(self, groups: Sequence[EqualRows]) -> dict[int, torch.Tensor]:
        """By length of a row; the same for all layers."""
        return {group.length: self.relative_bias(group.length) for group in groups}
