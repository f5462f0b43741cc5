"""ShardedParameter: what a network says about each of its weights, so that loading needs to know no layer.

Regions of one parameter's `data` along the cut axis, here the fused query, key and value of rank r:

    [q: dest_start .. +stop-start) [k: ...) [v: ...) [rows no part covers: zeros (padding)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from max_ray.weights.source import WeightSource

if TYPE_CHECKING:
    from max_ray.weights.quantized import QuantizedRows


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


@dataclass(frozen=True)
class StoredPart:
    """A part of a matrix as it lies in the checkpoint: what this rank reads of one tensor.

    quantization: as `WeightSource.quantization` says it; "" for a plain tensor.
    """

    source: WeightSource
    tensor: str
    rows: range
    columns: range
    quantization: str

    @classmethod
    def of(cls, spec: PartSpec, source: WeightSource, tensor: str) -> StoredPart:
        rows, columns = (range(size) for size in spec.checkpoint_shape)
        if spec.axis == 0:
            rows = range(spec.start, spec.stop)
        elif spec.axis == 1:
            columns = range(spec.start, spec.stop)
        return cls(source, tensor, rows, columns, source.quantization(tensor))

    def read(self) -> torch.Tensor:
        """A plain part, [rows, columns]."""
        whole_rows = len(self.columns) == self.source.shape(self.tensor)[1]
        axis, cut = (0, self.rows) if whole_rows else (1, self.columns)
        return self.source.get_slice(self.tensor, axis, cut.start, cut.stop)

    def read_quantized(self, rows: range) -> QuantizedRows:
        """Some rows (numbers of the checkpoint's) of a quantized part, with the part's columns."""
        return self.source.get_quantized(self.tensor, rows, self.columns)

    @property
    def block_type(self) -> str:
        """See `WeightSource.block_type`."""
        return self.source.block_type(self.tensor)

    def block_place(self) -> tuple[str, int, int, int] | None:
        """See `WeightSource.block_place`."""
        return self.source.block_place(self.tensor, self.rows, self.columns)

    def read_blocks(self, rows: range, buffer: torch.Tensor) -> torch.Tensor:
        """Some rows of a part that is stored in blocks, with the part's columns. See `WeightSource.get_blocks`."""
        return self.source.get_blocks(self.tensor, rows, self.columns, buffer)


@dataclass
class ShardedParameter:
    """A rank's shard of one parameter and how each part of it is cut from the checkpoint.

    data: the rank's own memory, filled in place; its dtype is the one that the network runs with. On the meta device
    where it has none yet.
    parts: "" for a plain parameter; "q", "k", "v" or "gate", "up" for fused ones.
    keep_quantized: of a matrix that may stay quantized: puts one made of these parts (in the order of their places)
    where `data` was, and gives its bytes. None for all others.
    pack: of a matrix that its layer holds packed: like keep_quantized, for plain parts; false where it cannot be packed
    while it is read, and nothing has been done then.
    allocate: of a parameter that has no memory yet: takes it, puts it where `data` was and gives it.
    """

    data: torch.Tensor
    parts: dict[str, PartSpec]
    keep_quantized: Callable[[Sequence[StoredPart]], int] | None = None
    pack: Callable[[Sequence[StoredPart]], bool] | None = None
    allocate: Callable[[], torch.Tensor] | None = None

    def take_memory(self) -> torch.Tensor:
        """`data`, with memory from now on."""
        if self.allocate is not None:
            self.data, self.allocate = self.allocate(), None
        return self.data


class HasShardedParameters(Protocol):
    """A network, as loading sees it."""

    def sharded_parameters(self) -> Iterator[tuple[str, ShardedParameter]]: ...
