"""The records of the Mistral family: data only."""

from __future__ import annotations

from architectures.mistral.model import MinistralModel, MistralEmbedder, MistralModel
from architectures.mistral.weight_adapters import embedder_name_map, gguf_name_map, safetensors_name_map
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

mistral_arch = SupportedArchitecture(
    name="MistralForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.1"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=EVERY_ENCODING,
    pipeline_model=MistralModel,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)

ministral_arch = SupportedArchitecture(
    name="MinistralForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["mistralai/Ministral-8B-Instruct-2410"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=EVERY_ENCODING,
    pipeline_model=MinistralModel,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)

mistral_embedder_arch = SupportedArchitecture(
    name="MistralForCausalLM",
    task=PipelineTask.EMBEDDINGS_GENERATION,
    example_repo_ids=["intfloat/e5-mistral-7b-instruct", "Salesforce/SFR-Embedding-Mistral"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings={
        SupportedEncoding.bfloat16: [],
        SupportedEncoding.float16: [],
        SupportedEncoding.float32: [],
    },
    pipeline_model=MistralEmbedder,
    tokenizer=EmbeddingsTokenizer,
    context_type=EmbeddingsContext,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: embedder_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)
