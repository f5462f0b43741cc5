"""The record of the Nomic BERT family: data only. One device: its fused products are not cut over ranks."""

from __future__ import annotations

from architectures.nomic_bert.model import NomicBertEncoder
from architectures.nomic_bert.model_config import NomicBertConfig
from architectures.nomic_bert.weight_adapters import safetensors_name_map
from max_ray.interfaces import EmbeddingsContext, PipelineTask
from max_ray.pipelines.lib import (
    EmbeddingsTokenizer,
    SupportedArchitecture,
    SupportedEncoding,
    WeightsFormat,
)

nomic_bert_arch = SupportedArchitecture(
    name="NomicBertModel",
    task=PipelineTask.EMBEDDINGS_GENERATION,
    example_repo_ids=["nomic-ai/nomic-embed-text-v1.5"],
    default_encoding=SupportedEncoding.float32,
    supported_encodings={
        SupportedEncoding.float32: [],
        SupportedEncoding.bfloat16: [],
        SupportedEncoding.float16: [],
    },
    pipeline_model=NomicBertEncoder,
    tokenizer=EmbeddingsTokenizer,
    context_type=EmbeddingsContext,
    config=NomicBertConfig,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    multi_gpu_supported=False,
)
