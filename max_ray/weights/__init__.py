"""Checkpoints: reading tensors lazily, renaming them, and filling a rank's shards with them."""

from max_ray.weights.checkpoint import SafetensorsSource, open_weights
from max_ray.weights.load import LoadReport, load_weights
from max_ray.weights.mapping import NameMap, OwnName, Renaming
from max_ray.weights.parameter import HasShardedParameters, PartSpec, ShardedParameter
from max_ray.weights.source import DictWeightSource, WeightSource

__all__ = [
    "DictWeightSource",
    "HasShardedParameters",
    "LoadReport",
    "NameMap",
    "OwnName",
    "PartSpec",
    "Renaming",
    "SafetensorsSource",
    "ShardedParameter",
    "WeightSource",
    "load_weights",
    "open_weights",
]
