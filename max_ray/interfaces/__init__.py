"""The contracts that every layer shares: words and shapes, no behaviour. Imports neither torch nor Ray."""

from max_ray.interfaces.context import LogProbabilities, TextContext, TokenBuffer
from max_ray.interfaces.embeddings import (
    EmbeddingsContext,
    EmbeddingsGenerationInputs,
    EmbeddingsGenerationOutput,
    EmbeddingsGenerationRequest,
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
    KVCacheParams,
    KVLedger,
    LeaseGrant,
    LeaseReply,
    LeaseRequest,
    LeaseWant,
)
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

__all__ = [
    "BlockingExecutor",
    "EmbeddingsContext",
    "EmbeddingsGenerationInputs",
    "EmbeddingsGenerationOutput",
    "EmbeddingsGenerationRequest",
    "Executor",
    "Extensions",
    "GenerationStatus",
    "GrammarSpec",
    "KVCacheInputs",
    "KVCacheParams",
    "KVCacheStrategy",
    "KVLedger",
    "LeaseGrant",
    "LeaseReply",
    "LeaseRequest",
    "LeaseWant",
    "LogProbabilities",
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
    "RopeType",
    "RunExtension",
    "RunRequest",
    "RunRow",
    "Runner",
    "SamplingParams",
    "StepOutput",
    "SupportedEncoding",
    "TextContext",
    "TextGenerationInputs",
    "TextGenerationOutput",
    "TextGenerationRequest",
    "TokenBuffer",
    "WeightsFormat",
]
