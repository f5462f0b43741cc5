"""Token embedding and output head, cut over the vocabulary.

A vocabulary V that the ranks do not divide is padded: each rank holds ceil(V / size) rows, the last ones zero.
Axes: T tokens, N tokens whose logits are wanted, D hidden size.
"""

from __future__ import annotations

import torch

from max_ray import kernels
from max_ray.distributed import TPGroup, all_gather, all_reduce
from max_ray.nn.linear import LayerWeight, Packable, linear
from max_ray.nn.module import Module
from max_ray.nn.quantized_linear import add_matrix
from max_ray.weights.parameter import PartSpec


class VocabParallelEmbedding(Module):
    """Token ids [T] -> [T, D], whole on every rank. Ids must be in [0, vocab_size)."""

    weight: torch.Tensor

    def __init__(self, vocab_size: int, dim: int, tp: TPGroup, *, dtype: torch.dtype = torch.float32) -> None:
        self._tp = tp
        self.vocab_size = vocab_size
        self._rows = vocab_range(vocab_size, tp)
        _add_vocab_weight(self, vocab_size, dim, tp, dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._tp.size == 1:
            return self._lookup(tokens)
        local = tokens - self._rows.start
        elsewhere = (local < 0) | (local >= len(self._rows))
        rows = self._lookup(local.masked_fill(elsewhere, 0))
        return all_reduce(rows.masked_fill_(elsewhere.unsqueeze(-1), 0), self._tp)

    def _lookup(self, rows: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor | LayerWeight = self.weight
        return kernels.gather_rows(weight, rows) if isinstance(weight, torch.Tensor) else weight.rows(rows)


class ParallelLMHead(Packable):
    """Hidden states [N, D] -> logits [N, V], gathered whole on every rank and cut to the true vocabulary.

    tied_to: the embedding whose shard serves as the head's weight too; then the head has no parameter of its own.
    """

    weight: torch.Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        tp: TPGroup,
        *,
        tied_to: VocabParallelEmbedding | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._tp = tp
        self.vocab_size = vocab_size
        self._tied_to = tied_to
        if tied_to is None:
            _add_vocab_weight(self, vocab_size, dim, tp, dtype)
        else:
            assert tuple(tied_to.weight.shape) == (padded_share(vocab_size, tp), dim), "tied weights of another shape"

    @property
    def home(self) -> Module:
        """A tied weight is the embedding's, which reads its rows from there in either form."""
        return self if self._tied_to is None else self._tied_to

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self._tied_to is None else self._tied_to.weight
        return all_gather(linear(hidden, weight, None), self._tp, axis=-1)[:, : self.vocab_size]


def padded_share(vocab_size: int, tp: TPGroup) -> int:
    """Rows of the vocabulary that each rank has memory for, padding included."""
    return -(-vocab_size // tp.size)


def vocab_range(vocab_size: int, tp: TPGroup) -> range:
    """The token ids that this rank holds; fewer than its share, or none, on the last ranks."""
    share = padded_share(vocab_size, tp)
    return range(min(tp.rank * share, vocab_size), min((tp.rank + 1) * share, vocab_size))


def _add_vocab_weight(module: Module, vocab_size: int, dim: int, tp: TPGroup, dtype: torch.dtype) -> None:
    rows = vocab_range(vocab_size, tp)
    parts = {"": PartSpec((vocab_size, dim), 0, rows.start, rows.stop, 0)}
    add_matrix(module, (padded_share(vocab_size, tp), dim), parts, dtype, tp.device)
