"""The records of the Gemma 3 family: data only."""

from __future__ import annotations

from architectures.gemma3.model import Gemma3Embedder, Gemma3Model
from architectures.gemma3.weight_adapters import embedder_name_map, gguf_name_map, safetensors_name_map
from max_ray.interfaces import EmbeddingsContext, PipelineTask
from max_ray.interfaces.encoding import EVERY_ENCODING
from max_ray.pipelines.lib import (
    EmbeddingsTokenizer,
    RopeType,
    SupportedArchitecture,
    SupportedEncoding,
    TextTokenizer,
    WeightsFormat,
)

gemma3_arch = SupportedArchitecture(
    name="Gemma3ForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["google/gemma-3-1b-it"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=EVERY_ENCODING,
    pipeline_model=Gemma3Model,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)

gemma3_embedder_arch = SupportedArchitecture(
    name="Gemma3ForCausalLM",
    task=PipelineTask.EMBEDDINGS_GENERATION,
    example_repo_ids=["google/embeddinggemma-300m"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings={
        SupportedEncoding.bfloat16: [],
        SupportedEncoding.float16: [],
        SupportedEncoding.float32: [],
    },
    pipeline_model=Gemma3Embedder,
    tokenizer=EmbeddingsTokenizer,
    context_type=EmbeddingsContext,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: embedder_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)
