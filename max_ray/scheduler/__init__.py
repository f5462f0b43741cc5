"""Continuous batching: the scheduler, the loops that drive it, and the queues to the readers."""

from max_ray.scheduler.activity import LoopActivity, RequestActivity
from max_ray.scheduler.batch_runner import TextPipeline
from max_ray.scheduler.decision import Batch, ScheduleDecision, SchedulerLimits
from max_ray.scheduler.embeddings_loop import EmbeddingsLoop
from max_ray.scheduler.engine_loop import EngineLoop
from max_ray.scheduler.generation_loop import GenerationLoop
from max_ray.scheduler.histogram import Histogram
from max_ray.scheduler.output_queue import OutputQueue, TokenStream
from max_ray.scheduler.scheduled_request import ScheduledRequest
from max_ray.scheduler.scheduler import Scheduler
from max_ray.scheduler.stats import SchedulerStats

__all__ = [
    "Batch",
    "EmbeddingsLoop",
    "EngineLoop",
    "GenerationLoop",
    "Histogram",
    "LoopActivity",
    "OutputQueue",
    "RequestActivity",
    "ScheduleDecision",
    "ScheduledRequest",
    "Scheduler",
    "SchedulerLimits",
    "SchedulerStats",
    "TextPipeline",
    "TokenStream",
]
