"""Continuous batching: who runs next (batch), the loop that runs them (loop), the way of the tokens (channel)."""

from max_ray.scheduler.batch import Batcher
from max_ray.scheduler.channel import Channel, TokenStream
from max_ray.scheduler.embeddings import EmbeddingsLoop
from max_ray.scheduler.loop import GenerationLoop, TextPipeline
from max_ray.scheduler.row import Batch, Decision, Row, SchedulerLimits
from max_ray.scheduler.stats import SchedulerStats

__all__ = [
    "Batch",
    "Batcher",
    "Channel",
    "Decision",
    "EmbeddingsLoop",
    "GenerationLoop",
    "Row",
    "SchedulerLimits",
    "SchedulerStats",
    "TextPipeline",
    "TokenStream",
]
