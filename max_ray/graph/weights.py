"""`max_ray.graph.weights`: formats of checkpoints, under the name the pipeline page uses."""

from max_ray.interfaces import WeightsFormat

__all__ = ["WeightsFormat"]
