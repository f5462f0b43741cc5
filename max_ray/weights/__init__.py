"""Checkpoints: reading tensors lazily, renaming them, and filling a rank's shards with them.

Importing this package imports no torch: names, shapes and sizes are known without it. What needs torch is imported when
first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from max_ray.weights.checkpoint import SafetensorsSource, open_weights
from max_ray.weights.gguf_source import GgufSource
from max_ray.weights.mapping import NameMap, OwnName, Renaming
from max_ray.weights.safetensors_header import TensorEntry
from max_ray.weights.source import DictWeightSource, WeightSource

if TYPE_CHECKING:
    from max_ray.weights.load import LoadReport, load_weights
    from max_ray.weights.parameter import HasShardedParameters, PartSpec, ShardedParameter
    from max_ray.weights.quantized import QuantizedRows

__all__ = [
    "DictWeightSource",
    "GgufSource",
    "HasShardedParameters",
    "LoadReport",
    "NameMap",
    "OwnName",
    "PartSpec",
    "QuantizedRows",
    "Renaming",
    "SafetensorsSource",
    "ShardedParameter",
    "TensorEntry",
    "WeightSource",
    "load_weights",
    "open_weights",
]

_LATER = {
    "HasShardedParameters": "max_ray.weights.parameter",
    "LoadReport": "max_ray.weights.load",
    "PartSpec": "max_ray.weights.parameter",
    "QuantizedRows": "max_ray.weights.quantized",
    "ShardedParameter": "max_ray.weights.parameter",
    "load_weights": "max_ray.weights.load",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
