"""Tensor parallelism: the group of ranks that hold one model together, and what they say to each other."""

from max_ray.distributed.collectives import all_gather, all_reduce, all_reduce_min, broadcast
from max_ray.distributed.group import TPGroup, init_tp_group
from max_ray.distributed.step_deadline import StepDeadline

__all__ = ["StepDeadline", "TPGroup", "all_gather", "all_reduce", "all_reduce_min", "broadcast", "init_tp_group"]
