"""From the vectors of a text's tokens to the text's vector: pooling, dense stages, normalization; in float32.

Axes: T tokens of a ragged batch, B rows (texts), D hidden size. Row b is tokens [indptr[b], indptr[b + 1]).
The modes are those of sentence-transformers (Reimers and Gurevych 2019; `weightedmean`: Muennighoff 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from max_ray.errors import WeightsError
from max_ray.sentence_files import DenseStage, SentenceFiles
from max_ray.weights import open_weights
from max_ray.weights.finite import check_finite

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "GELU": F.gelu,
    "ReLU": F.relu,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, eq=False)
class _Dense:
    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in] -> [B, out]."""
        return ACTIVATIONS[self.activation](F.linear(x, self.weight, self.bias))


class SentenceHead:
    """All that comes after the network. Made by `load`."""

    def __init__(
        self, pooling: tuple[str, ...], dense: list[_Dense], normalize: bool, truncate_dim: int | None = None
    ) -> None:
        self._pooling = pooling
        self._dense = dense
        self._normalize = normalize
        self._truncate_dim = truncate_dim

    @classmethod
    def load(cls, files: SentenceFiles, model_dir: Path, device: torch.device) -> SentenceHead:
        """Raises WeightsError and ModelPathError where a dense stage's weights are not what its config.json says."""
        dense = [_load_dense(stage, model_dir / stage.folder, device) for stage in files.dense]
        return cls(files.pooling, dense, files.normalize, files.truncate_dim)

    def __call__(self, hidden: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
        """hidden [T, D], indptr int64 [B + 1] -> float32 [B, embedding size]."""
        hidden = hidden.float()
        pooled = torch.cat([POOLINGS[mode](hidden, indptr) for mode in self._pooling], dim=-1)
        for stage in self._dense:
            pooled = stage(pooled)
        pooled = F.normalize(pooled, dim=-1) if self._normalize else pooled
        return pooled[:, : self._truncate_dim]


def _load_dense(stage: DenseStage, folder: Path, device: torch.device) -> _Dense:
    source = open_weights(folder)
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (stage.out_features, stage.in_features)}
    if stage.bias:
        shapes["linear.bias"] = (stage.out_features,)
    if set(source.names()) != set(shapes) or any(tuple(source.shape(n)) != shape for n, shape in shapes.items()):
        found = {name: tuple(source.shape(name)) for name in source.names()}
        raise WeightsError(f"{folder} should hold the weights {shapes} and holds {found}. Is its config.json its own?")
    tensors = [source.get(name).float().to(device) for name in shapes]
    for name, tensor in zip(shapes, tensors, strict=True):
        check_finite(name, tensor)
    return _Dense(tensors[0], tensors[1] if stage.bias else None, stage.activation)


def _row_of(indptr: torch.Tensor) -> torch.Tensor:
    """int64 [T]: the row of each token."""
    return torch.repeat_interleave(torch.arange(len(indptr) - 1, device=indptr.device), indptr.diff())


def _sums(weighted: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    """[T, D] -> [B, D], each row's tokens in their order."""
    if weighted.is_cuda:  # index_add_ would be atomic
        return torch.segment_reduce(weighted, "sum", lengths=indptr.diff(), axis=0, unsafe=True)
    sums = torch.zeros(len(indptr) - 1, weighted.shape[-1], device=weighted.device)
    return sums.index_add_(0, _row_of(indptr), weighted)


def _lengths(indptr: torch.Tensor) -> torch.Tensor:
    """float32 [B, 1]."""
    return indptr.diff().float().unsqueeze(-1)


def _first(hidden: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    return hidden[indptr[:-1]]


def _last(hidden: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    return hidden[indptr[1:] - 1]


def _mean(hidden: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    return _sums(hidden, indptr) / _lengths(indptr)


def _mean_sqrt(hidden: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    return _sums(hidden, indptr) / _lengths(indptr).sqrt()


def _weighted_mean(hidden: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    """The token at position p (from 1) has the weight p."""
    places = torch.arange(len(hidden), device=hidden.device) - indptr[:-1][_row_of(indptr)] + 1
    lengths = _lengths(indptr)
    return _sums(hidden * places.unsqueeze(-1), indptr) / (lengths * (lengths + 1) / 2)


def _max(hidden: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    rows = _row_of(indptr).unsqueeze(-1).expand_as(hidden)
    lowest = torch.full((len(indptr) - 1, hidden.shape[-1]), -torch.inf, device=hidden.device)
    return lowest.scatter_reduce_(0, rows, hidden, "amax")


POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
