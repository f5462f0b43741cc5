"""Continuous batching: who runs next (batch), the loop that runs them (loop), the way of the tokens (channel)."""

from max_ray.scheduler.batch import Batch, Batcher, Decision, Row, SchedulerLimits
from max_ray.scheduler.channel import Channel, TokenStream
from max_ray.scheduler.loop import GenerationLoop, TextPipeline
from max_ray.scheduler.stats import SchedulerStats

__all__ = [
    "Batch",
    "Batcher",
    "Channel",
    "Decision",
    "GenerationLoop",
    "Row",
    "SchedulerLimits",
    "SchedulerStats",
    "TextPipeline",
    "TokenStream",
]
