"""Linear layers: the plain one, and those whose weight is cut over a tensor-parallel group.

Axes: T tokens, I in_dim, O out_dim. Weights are [O, I] as in a checkpoint. A column-parallel layer cuts O (each rank
gives its own part of the output), a row-parallel one cuts I (each rank gives a summand of the output).

Weights of the parallel layers are uninitialised memory until loaded, on a GPU no memory at all (`add_matrix`); weight
rows of the fused layers, rank r of 2:

    merged  [gate: rows r*F/2 .. (r+1)*F/2) [up: the same rows)
    qkv     [q: heads r*H/2 .. (r+1)*H/2) [k: this rank's KV heads) [v: the same)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from max_ray import kernels
from max_ray.distributed import TPGroup, all_reduce
from max_ray.driver import DeviceLike, as_torch_device
from max_ray.errors import WeightsError
from max_ray.nn.module import Module
from max_ray.nn.quantized_linear import add_matrix
from max_ray.weights.parameter import PartSpec


class LayerWeight(Protocol):
    """A weight in another form than a tensor [O, I]: packed for a kernel, or quantized."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., I] -> x W^T + bias [..., O]."""

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weight: int64 [T] -> [T, I]."""


def linear(x: torch.Tensor, weight: torch.Tensor | LayerWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., I] @ weight [O, I]^T + bias [O] -> [..., O]. All layers multiply here."""
    return F.linear(x, weight, bias) if isinstance(weight, torch.Tensor) else weight.linear(x, bias)


def pack_weights(network: Module) -> int:
    """Puts the weights of all linear layers into the form that the kernels read fastest, in place and one at a time.

    Such a weight is a LayerWeight from then on and no parameter any more (see `Module.parameters`). Quantized experts
    are stacked where they run so. Returns how many layers have another form now: on a GPU such experts only.

    Raises WeightsError for a matrix that was never filled and has no memory: torch's products take it without a word.
    """
    unfilled = [name for name, parameter in network.sharded_parameters() if parameter.allocate is not None]
    if unfilled:
        raise WeightsError(f"{len(unfilled)} weights were never loaded: {', '.join(unfilled[:10])}.")
    return sum(module.pack() for _, module in network.named_modules() if isinstance(module, Packable))


class Packable(Module):
    """A layer whose weight is read by `linear` alone, or by others that know both forms."""

    @property
    def home(self) -> Module:
        """The module whose attribute `weight` it is."""
        return self

    def pack(self) -> bool:
        """Whether the weight has another form now."""
        weight = self.home.__dict__["weight"]
        packed = kernels.pack_weight(weight) if isinstance(weight, torch.Tensor) else None
        if packed is not None:
            put_weight(self.home, packed)
        return packed is not None


def put_weight(module: Module, weight: LayerWeight) -> None:
    """`module.weight` is no parameter from now on, but `weight`."""
    module.drop_parameter("weight")
    module.__dict__["weight"] = weight


@dataclass(frozen=True)
class _Slab:
    """A range [start, stop) of the output rows of one checkpoint tensor of `total` rows."""

    name: str
    total: int
    start: int
    stop: int


class Linear(Packable):
    """y = x W^T + b. Initialised as torch.nn.Linear is: uniform in +-1/sqrt(in_dim)."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        bias: bool = True,
        *,
        dtype: torch.dtype = torch.float32,
        device: DeviceLike = "cpu",
    ) -> None:
        bound = 1.0 / math.sqrt(in_dim)
        place = as_torch_device(device)
        self.add_parameter("weight", torch.empty(out_dim, in_dim, dtype=dtype, device=place).uniform_(-bound, bound))
        self.bias = None
        if bias:
            self.add_parameter("bias", torch.empty(out_dim, dtype=dtype, device=place).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class _ColumnCut(Packable):
    """Base of the column-parallel layers: a weight made of slabs of checkpoint rows, and its bias if any."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_dim: int, slabs: list[_Slab], bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        rows = sum(slab.stop - slab.start for slab in slabs)
        add_matrix(self, (rows, in_dim), _row_parts(slabs, (in_dim,)), dtype, device)
        self.bias = None
        if bias:
            self.add_parameter("bias", torch.empty(rows, dtype=dtype, device=device), _row_parts(slabs, ()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class ColumnParallelLinear(_ColumnCut):
    """[T, I] -> [T, O / size]: this rank's columns of the output."""

    def __init__(
        self, in_dim: int, out_dim: int, tp: TPGroup, *, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(in_dim, [_even_slab("", out_dim, tp)], bias, dtype, tp.device)


class MergedColumnParallelLinear(_ColumnCut):
    """Several column-parallel layers of one input in one product: [T, I] -> [T, sum(out_dims) / size].

    out_dims: output size by part name, in order: {"gate": F, "up": F}. Each part is cut by itself.
    """

    def __init__(
        self,
        in_dim: int,
        out_dims: dict[str, int],
        tp: TPGroup,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        slabs = [_even_slab(name, out_dim, tp) for name, out_dim in out_dims.items()]
        super().__init__(in_dim, slabs, bias, dtype, tp.device)


class QKVParallelLinear(_ColumnCut):
    """Queries, keys and values in one product: [T, I] -> [T, (num_heads + 2 * num_kv_heads) * head_dim] of this rank.

    Heads are cut whole. With fewer KV heads than ranks, rank r holds a copy of KV head r * num_kv_heads // size.
    `num_heads` and `num_kv_heads` are attributes too: the counts of this rank.
    """

    num_heads: int
    num_kv_heads: int

    def __init__(
        self,
        in_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        tp: TPGroup,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        heads = shard_range(num_heads, tp)
        kv_heads = kv_head_range(num_kv_heads, tp)
        self.num_heads = len(heads)
        self.num_kv_heads = len(kv_heads)
        slabs = [
            _head_slab("q", num_heads, heads, head_dim),
            _head_slab("k", num_kv_heads, kv_heads, head_dim),
            _head_slab("v", num_kv_heads, kv_heads, head_dim),
        ]
        super().__init__(in_dim, slabs, bias, dtype, tp.device)


class RowParallelLinear(Packable):
    """[T, I / size] -> [T, O], summed over the ranks; the bias is whole on every rank and added once, after the sum.

    reduce: False leaves each rank its summand, for a caller that sums several layers at once; without a bias only.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        tp: TPGroup,
        *,
        bias: bool = False,
        reduce: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert reduce or not bias, "the bias is added after the sum over the ranks"
        self._tp = tp
        self._reduce = reduce
        columns = shard_range(in_dim, tp)
        parts = {"": PartSpec((out_dim, in_dim), 1, columns.start, columns.stop, 0)}
        add_matrix(self, (out_dim, len(columns)), parts, dtype, tp.device)
        self.bias = None
        if bias:
            self.add_parameter("bias", torch.empty(out_dim, dtype=dtype, device=tp.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._tp.size == 1 or not self._reduce:
            return linear(x, self.weight, self.bias)
        y = all_reduce(linear(x, self.weight, None), self._tp)
        return y if self.bias is None else y + self.bias


def shard_range(total: int, tp: TPGroup) -> range:
    """The indices of `total` things that this rank holds. The ranks must divide them: families check it beforehand."""
    assert total % tp.size == 0, f"{total} cannot be cut over {tp.size} ranks"
    share = total // tp.size
    return range(tp.rank * share, (tp.rank + 1) * share)


def kv_head_range(num_kv_heads: int, tp: TPGroup) -> range:
    """The KV heads that this rank holds: its share, or one shared with other ranks where there are too few."""
    if num_kv_heads >= tp.size:
        return shard_range(num_kv_heads, tp)
    assert tp.size % num_kv_heads == 0, f"{num_kv_heads} KV heads cannot be replicated evenly on {tp.size} ranks"
    head = tp.rank * num_kv_heads // tp.size
    return range(head, head + 1)


def _even_slab(name: str, total: int, tp: TPGroup) -> _Slab:
    rows = shard_range(total, tp)
    return _Slab(name, total, rows.start, rows.stop)


def _head_slab(name: str, num_heads: int, heads: range, head_dim: int) -> _Slab:
    return _Slab(name, num_heads * head_dim, heads.start * head_dim, heads.stop * head_dim)


def _row_parts(slabs: list[_Slab], tail: tuple[int, ...]) -> dict[str, PartSpec]:
    """Parts of a parameter whose axis 0 is the slabs one after another; `tail`: the shape of the other axes."""
    parts: dict[str, PartSpec] = {}
    dest = 0
    for slab in slabs:
        parts[slab.name] = PartSpec((slab.total, *tail), 0, slab.start, slab.stop, dest)
        dest += slab.stop - slab.start
    return parts
