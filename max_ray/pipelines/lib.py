"""`max_ray.pipelines.lib`: what the author of an architecture imports. Importing it imports no torch, no pydantic."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from max_ray.architecture import SupportedArchitecture
from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import (
    KVCacheInputs,
    KVCacheParams,
    ModelInputs,
    ModelOutputs,
    RopeType,
    SupportedEncoding,
    WeightsFormat,
)
from max_ray.modeling import PipelineModel

if TYPE_CHECKING:
    from max_ray.config import PipelineConfig
    from max_ray.modeling.text_pipeline_model import TextPipelineModel
    from max_ray.pipelines.builder import PIPELINE_REGISTRY, PipelineRegistry
    from max_ray.tokenization.embeddings_tokenizer import EmbeddingsTokenizer
    from max_ray.tokenization.pair_tokenizer import JudgeTokenizer, PairTokenizer
    from max_ray.tokenization.tokenizer import TextTokenizer

__all__ = [
    "PIPELINE_REGISTRY",
    "EmbeddingsTokenizer",
    "HuggingFaceConfig",
    "JudgeTokenizer",
    "KVCacheInputs",
    "KVCacheParams",
    "ModelInputs",
    "ModelOutputs",
    "PairTokenizer",
    "PipelineConfig",
    "PipelineModel",
    "PipelineRegistry",
    "RopeType",
    "SupportedArchitecture",
    "SupportedEncoding",
    "TextPipelineModel",
    "TextTokenizer",
    "WeightsFormat",
]

_LATER = {
    "EmbeddingsTokenizer": "max_ray.tokenization.embeddings_tokenizer",
    "JudgeTokenizer": "max_ray.tokenization.pair_tokenizer",
    "PairTokenizer": "max_ray.tokenization.pair_tokenizer",
    "PIPELINE_REGISTRY": "max_ray.pipelines.builder",
    "PipelineConfig": "max_ray.config",
    "PipelineRegistry": "max_ray.pipelines.builder",
    "TextPipelineModel": "max_ray.modeling.text_pipeline_model",
    "TextTokenizer": "max_ray.tokenization.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
