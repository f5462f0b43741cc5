"""Gives PIPELINE_REGISTRY its builder, so that the registry need not know who builds. No torch until it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from max_ray.config import PipelineConfig
from max_ray.interfaces import PipelineTask
from max_ray.registry import PIPELINE_REGISTRY, PipelineRegistry

if TYPE_CHECKING:
    from max_ray.interfaces import PipelinesFactory

__all__ = ["PIPELINE_REGISTRY", "PipelineRegistry"]


def _build(
    config: PipelineConfig, task: PipelineTask | None, override_architecture: str | None
) -> tuple[Any, PipelinesFactory]:
    from max_ray.pipelines.factory import build_factory

    return build_factory(config, task, override_architecture)


PIPELINE_REGISTRY.set_builder(_build)
