"""The pipeline system's front door: PIPELINE_REGISTRY, PipelineConfig, and the pieces a family is made of.

Importing this package imports no torch and no pydantic; what needs them is imported when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from max_ray.architecture import SupportedArchitecture

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig
    from max_ray.pipelines.builder import PIPELINE_REGISTRY, PipelineRegistry
    from max_ray.pipelines.embeddings import EmbeddingsPipeline
    from max_ray.pipelines.text_generation import TextGenerationPipeline
    from max_ray.planning.plan import PipelinePlan, resolve_plan
    from max_ray.tokenization.embeddings_tokenizer import EmbeddingsTokenizer
    from max_ray.tokenization.tokenizer import TextTokenizer

__all__ = [
    "PIPELINE_REGISTRY",
    "EmbeddingsPipeline",
    "EmbeddingsTokenizer",
    "PipelineConfig",
    "PipelinePlan",
    "PipelineRegistry",
    "SupportedArchitecture",
    "TextGenerationPipeline",
    "TextTokenizer",
    "resolve_plan",
]

_LATER = {
    "EmbeddingsPipeline": "max_ray.pipelines.embeddings",
    "EmbeddingsTokenizer": "max_ray.tokenization.embeddings_tokenizer",
    "PIPELINE_REGISTRY": "max_ray.pipelines.builder",
    "PipelineConfig": "max_ray.config",
    "PipelineRegistry": "max_ray.pipelines.builder",
    "PipelinePlan": "max_ray.planning.plan",
    "TextGenerationPipeline": "max_ray.pipelines.text_generation",
    "TextTokenizer": "max_ray.tokenization.tokenizer",
    "resolve_plan": "max_ray.planning.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
