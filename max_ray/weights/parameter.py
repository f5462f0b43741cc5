"""ShardedParameter: what a network says about each of its weights, so that loading needs to know no layer.

Regions of one parameter's `data` along the cut axis, here the fused query, key and value of rank r:

    [q: dest_start .. +stop-start) [k: ...) [v: ...) [rows no part covers: zeros (padding)]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class PartSpec:
    """Which range of one checkpoint tensor a rank reads, and where that range lands.

    checkpoint_shape: full shape that the checkpoint's tensor must have.
    axis: the axis that is cut; None means that every rank reads the whole tensor (then `start`, `stop` are not used).
    start, stop: range of the checkpoint's axis that this rank reads; empty where the rank holds padding only.
    dest_start: where the range begins along `axis` of `data` (axis 0 when `axis` is None).
    """

    checkpoint_shape: tuple[int, ...]
    axis: int | None
    start: int
    stop: int
    dest_start: int

    @classmethod
    def whole(cls, shape: tuple[int, ...], dest_start: int = 0) -> PartSpec:
        """A part that is read whole on every rank."""
        return cls(tuple(shape), None, 0, shape[0] if shape else 0, dest_start)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the piece that this rank reads."""
        if self.axis is None:
            return self.checkpoint_shape
        shape = list(self.checkpoint_shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)


@dataclass
class ShardedParameter:
    """A rank's shard of one parameter and how each part of it is cut from the checkpoint.

    data: the rank's own memory, filled in place; its dtype is the one that the network runs with.
    parts: "" for a plain parameter; "q", "k", "v" or "gate", "up" for fused ones.
    """

    data: torch.Tensor
    parts: dict[str, PartSpec]


class HasShardedParameters(Protocol):
    """A network, as loading sees it."""

    def sharded_parameters(self) -> Iterator[tuple[str, ShardedParameter]]: ...
