"""What a family says of the head that makes a score of a pair: data only. See `max_ray.engine.score_head`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError


@dataclass(frozen=True)
class ScoreLayer:
    """A linear layer.

    Args:
        weights: Names that its matrix [out, in] may have in a checkpoint; the first one that is there counts.
        bias: The name of its bias; None: it has none.
        activation: Behind it: `Tanh` or `Identity`.
    """

    weights: tuple[str, ...]
    bias: str | None = None
    activation: str = "Identity"


@dataclass(frozen=True)
class ScoreLayers:
    """A head.

    Args:
        pooling: Which token it is about: `cls` or `lasttoken`.
        layers: One after another; the last one gives one number.
        contrast: Two tokens: the only layer's rows are of the vocabulary, and the score is the first token's row minus
            the second's. None: the layer is as it is.
    """

    pooling: str
    layers: tuple[ScoreLayer, ...]
    contrast: tuple[str, str] | None = None


def check_one_label(huggingface_config: Any) -> None:
    """Raises ConfigError for a classifier of several classes. Without a word in config.json there are two."""
    labels = huggingface_config.get("id2label")
    num_labels = len(labels) if labels else huggingface_config.get("num_labels", 2)
    if num_labels != 1:
        raise ConfigError(
            f"config.json names {num_labels} labels, and a score is made by a model of one, such as a reranker."
        )
