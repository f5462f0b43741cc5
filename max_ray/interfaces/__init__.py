"""The contracts that every layer shares: words and shapes, no behaviour. Imports neither torch nor Ray."""

from importlib import import_module
from typing import Any

from max_ray.interfaces.context import LogProbabilities, TextContext, TokenBuffer
from max_ray.interfaces.embeddings import (
    EmbeddingsContext,
    EmbeddingsGenerationInputs,
    EmbeddingsGenerationOutput,
    EmbeddingsGenerationRequest,
    ScoreRequest,
)
from max_ray.interfaces.encoding import KVCacheStrategy, RopeType, SupportedEncoding, WeightsFormat
from max_ray.interfaces.executor import (
    BlockingExecutor,
    Executor,
    Extensions,
    RunExtension,
    Runner,
    RunRequest,
    RunRow,
    StepOutput,
)
from max_ray.interfaces.grammar import GrammarSpec
from max_ray.interfaces.image import PromptImage
from max_ray.interfaces.kv_cache import (
    BlockGrant,
    BlockRequest,
    CacheReply,
    CacheUpdate,
    KVCacheClient,
    KVCacheParams,
)
from max_ray.interfaces.logit_controls import LogitControls
from max_ray.interfaces.model_inputs import KVCacheInputs, ModelInputs, ModelOutputs
from max_ray.interfaces.pipeline import (
    Pipeline,
    PipelineInputs,
    PipelineOutput,
    PipelineOutputsDict,
    PipelinesFactory,
    TextGenerationInputs,
    TextGenerationOutput,
)
from max_ray.interfaces.request import Request, RequestID, SamplingParams, TextGenerationRequest
from max_ray.interfaces.task import GenerationStatus, PipelineTask
from max_ray.interfaces.tokenizer import PipelineTokenizer
from max_ray.interfaces.trace import RequestTrace, WaitReason

__all__ = [
    "BlockGrant",
    "BlockRequest",
    "BlockingExecutor",
    "CacheReply",
    "CacheUpdate",
    "EmbeddingsContext",
    "EmbeddingsGenerationInputs",
    "EmbeddingsGenerationOutput",
    "EmbeddingsGenerationRequest",
    "Executor",
    "Extensions",
    "GenerationStatus",
    "GrammarSpec",
    "KVCacheClient",
    "KVCacheInputs",
    "KVCacheParams",
    "KVCacheStrategy",
    "LogProbabilities",
    "LogitControls",
    "ModelInputs",
    "ModelOutputs",
    "Pipeline",
    "PipelineInputs",
    "PipelineOutput",
    "PipelineOutputsDict",
    "PipelineTask",
    "PipelineTokenizer",
    "PipelinesFactory",
    "PromptImage",
    "Request",
    "RequestID",
    "RequestTrace",
    "RopeType",
    "RunExtension",
    "RunRequest",
    "RunRow",
    "Runner",
    "SamplingParams",
    "ScoreRequest",
    "StepOutput",
    "SupportedEncoding",
    "TextContext",
    "TextGenerationInputs",
    "TextGenerationOutput",
    "TextGenerationRequest",
    "TokenBuffer",
    "WaitReason",
    "WeightsFormat",
]


def __getattr__(name: str) -> Any:
    """The pipeline page names PipelineModel here; its home is `max_ray.modeling`."""
    if name == "PipelineModel":
        return import_module("max_ray.modeling").PipelineModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
