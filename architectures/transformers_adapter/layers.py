"""What takes the place of `torch.nn.Linear` and `torch.nn.Embedding` in a network of `transformers`: our own layers,
which are packed for the kernels, may stay quantized, and are cut over the ranks as the network's plan says.
"""

from __future__ import annotations

from typing import cast

import torch

from architectures.transformers_adapter.tensor_parallel import GATHERED, SPLIT
from max_ray.distributed import TPGroup, all_gather
from max_ray.nn import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    Module,
    ParallelLMHead,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from max_ray.nn.linear import shard_range


class Slot(torch.nn.Module):
    """A place in the network with one of our layers in it. Leading axes of the input pass through.

    weight_was_read: whether the network's code has read the weight by itself (or only its dtype): it is left as a
    tensor then.
    """

    def __init__(self, layer: Module) -> None:
        super().__init__()
        self.layer = layer  # no torch module: torch does not list it
        self.weight_was_read = False

    @property
    def weight(self) -> torch.Tensor:
        self.weight_was_read = True
        return cast(torch.Tensor, self.layer.weight)  # type: ignore[attr-defined]

    @property
    def bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = getattr(self.layer, "bias", None)
        return bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x.flatten(0, -2))
        return y.view(*x.shape[:-1], y.shape[-1])


class LinearSlot(Slot):
    """in_features, out_features: of the whole layer, as `torch.nn.Linear` has them."""

    def __init__(self, layer: Module, linear: torch.nn.Linear) -> None:
        super().__init__(layer)
        self.in_features, self.out_features = linear.in_features, linear.out_features


class GatheredSlot(LinearSlot):
    """A column-parallel layer whose output all ranks get whole."""

    def __init__(self, layer: Module, linear: torch.nn.Linear, tp: TPGroup) -> None:
        super().__init__(layer, linear)
        self._tp = tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return all_gather(super().forward(x), self._tp, axis=-1)


class SplitSlot(LinearSlot):
    """A row-parallel layer whose input all ranks have whole."""

    def __init__(self, layer: Module, linear: torch.nn.Linear, tp: TPGroup) -> None:
        super().__init__(layer, linear)
        self._own = shard_range(linear.in_features, tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., self._own.start : self._own.stop])


class EmbeddingSlot(Slot):
    """Token ids [..] -> [.., D]."""

    def __init__(self, layer: VocabParallelEmbedding, embedding: torch.nn.Embedding) -> None:
        super().__init__(layer)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x.flatten())
        return y.view(*x.shape, y.shape[-1])


def linear_slot(linear: torch.nn.Linear, style: str, tp: TPGroup, dtype: torch.dtype) -> LinearSlot:
    """Our layer for a linear layer under a style of the plan. What is gathered or split but cannot be divided is whole
    on every rank."""
    rows, columns, bias = linear.out_features, linear.in_features, linear.bias is not None
    if tp.size > 1:
        if style == "colwise":
            return LinearSlot(ColumnParallelLinear(columns, rows, tp, bias=bias, dtype=dtype), linear)
        if style == "packed_colwise":
            halves = {"0": rows // 2, "1": rows // 2}
            return LinearSlot(MergedColumnParallelLinear(columns, halves, tp, bias=bias, dtype=dtype), linear)
        if style == "rowwise":
            return LinearSlot(RowParallelLinear(columns, rows, tp, bias=bias, dtype=dtype), linear)
        if style in GATHERED and rows % tp.size == 0:
            return GatheredSlot(ColumnParallelLinear(columns, rows, tp, bias=bias, dtype=dtype), linear, tp)
        if style in SPLIT and columns % tp.size == 0:
            return SplitSlot(RowParallelLinear(columns, rows, tp, bias=bias, dtype=dtype), linear, tp)
    alone = TPGroup.single(tp.device)
    return LinearSlot(ColumnParallelLinear(columns, rows, alone, bias=bias, dtype=dtype), linear)


def vocabulary_slots(
    embedding: torch.nn.Embedding, head: torch.nn.Linear, tied: bool, tp: TPGroup, dtype: torch.dtype
) -> tuple[EmbeddingSlot, LinearSlot]:
    """The token embedding and the output head, cut over the vocabulary."""
    vocabulary, dim = embedding.num_embeddings, embedding.embedding_dim
    own = VocabParallelEmbedding(vocabulary, dim, tp, dtype=dtype)
    own_head = ParallelLMHead(vocabulary, dim, tp, tied_to=own if tied else None, dtype=dtype)
    return EmbeddingSlot(own, embedding), LinearSlot(own_head, head)
