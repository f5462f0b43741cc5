"""Checkpoints: reading tensors lazily, renaming them, and filling a rank's shards with them."""

from max_ray.weights.parameter import HasShardedParameters, PartSpec, ShardedParameter

__all__ = ["HasShardedParameters", "PartSpec", "ShardedParameter"]
