"""ScoreHead: from the hidden states of a pair of texts to its score, in float32.

Axes: T tokens of a ragged batch, B rows (pairs), D hidden size. Row b is tokens [indptr[b], indptr[b + 1]).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from max_ray.engine.pooling_head import ACTIVATIONS, POOLINGS
from max_ray.errors import WeightsError
from max_ray.modeling.score_layers import ScoreLayer, ScoreLayers
from max_ray.weights.finite import check_finite
from max_ray.weights.source import WeightSource

_Linear = tuple[torch.Tensor, torch.Tensor | None, Callable[[torch.Tensor], torch.Tensor]]


class ScoreHead:
    """All that comes after the network. Made by `load`.

    Args:
        pooling: Which token counts.
        layers: (weight [out, in], bias [out] or None, activation), one after another.
        activation: Of the score: `Sigmoid` or `Identity`.
    """

    def __init__(self, pooling: str, layers: list[_Linear], activation: str) -> None:
        self._pooling = POOLINGS[pooling]
        self._layers = layers
        self._activation = ACTIVATIONS[activation]

    @classmethod
    def load(
        cls,
        layers: ScoreLayers,
        source: WeightSource,
        activation: str,
        token_id: Callable[[str], int],
        device: torch.device,
    ) -> ScoreHead:
        """Reads the head's tensors from a checkpoint.

        Args:
            layers: What the family says.
            source: The checkpoint.
            activation: Of the score.
            token_id: The id of a text that is one token.
            device: Where the head runs.

        Raises:
            WeightsError: A tensor is missing, or the head gives more than one number.
        """
        read = [_read(layer, source, layers.contrast, token_id, device) for layer in layers.layers]
        if len(read[-1][0]) != 1:
            raise WeightsError(f"The head gives {len(read[-1][0])} numbers, and a score is one.")
        return cls(layers.pooling, read, activation)

    def __call__(self, hidden: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
        """hidden [T, D], indptr int64 [B + 1] -> float32 [B, 1]."""
        x = self._pooling(hidden, indptr).float()
        for weight, bias, activation in self._layers:
            x = activation(F.linear(x, weight, bias))
        return self._activation(x)


def _read(
    layer: ScoreLayer,
    source: WeightSource,
    contrast: tuple[str, str] | None,
    token_id: Callable[[str], int],
    device: torch.device,
) -> _Linear:
    known = set(source.names())
    name = next((name for name in layer.weights if name in known), layer.weights[0])
    if contrast is None:
        weight = source.get(name).float()
    else:
        first, second = (source.get_slice(name, 0, i, i + 1).float() for i in map(token_id, contrast))
        weight = first - second
    bias = None if layer.bias is None else source.get(layer.bias).float()
    for part in (weight, bias):
        if part is not None:
            check_finite(name, part)
    return weight.to(device), None if bias is None else bias.to(device), ACTIVATIONS[layer.activation]
