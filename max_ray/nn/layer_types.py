"""Which layers of a network see the whole text and which a sliding window, as config.json's `layer_types` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from max_ray.errors import ConfigError

FULL = "full_attention"
SLIDING = "sliding_attention"


def layer_types(huggingface_config: Any, num_layers: int, default: Sequence[str]) -> tuple[str, ...]:
    """FULL or SLIDING for each layer: `layer_types` of config.json, by default `default`.

    Raises ConfigError for a kind of layer that is neither, or another number of layers.
    """
    types = tuple(huggingface_config.get("layer_types") or default)
    unknown = sorted({str(kind) for kind in types} - {FULL, SLIDING})
    if unknown:
        raise ConfigError(
            f"config.json: layer_types has {unknown[0]!r}; this family has {FULL!r} and {SLIDING!r} only."
        )
    if len(types) != num_layers:
        raise ConfigError(f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {num_layers}.")
    return types


def layer_windows(types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """The sliding window of each layer in tokens, None where it sees everything. Raises ConfigError for a SLIDING
    layer without a window of at least 1."""
    if SLIDING in types and (not isinstance(window, int) or window < 1):
        raise ConfigError(f"config.json: layer_types asks for sliding windows, but sliding_window is {window!r}.")
    return tuple(window if kind == SLIDING else None for kind in types)
