"""The record of the DistilBERT family: data only."""

from __future__ import annotations

from architectures.distilbert.model import DistilBertEncoder
from architectures.distilbert.model_config import DistilBertConfig
from architectures.distilbert.weight_adapters import safetensors_name_map
from max_ray.interfaces import EmbeddingsContext, PipelineTask
from max_ray.pipelines.lib import (
    EmbeddingsTokenizer,
    SupportedArchitecture,
    SupportedEncoding,
    WeightsFormat,
)

distilbert_arch = SupportedArchitecture(
    name="DistilBertModel",
    task=PipelineTask.EMBEDDINGS_GENERATION,
    example_repo_ids=[
        "sentence-transformers/msmarco-distilbert-base-v4",
        "sentence-transformers/multi-qa-distilbert-cos-v1",
    ],
    default_encoding=SupportedEncoding.float32,
    supported_encodings={
        SupportedEncoding.float32: [],
        SupportedEncoding.bfloat16: [],
        SupportedEncoding.float16: [],
    },
    pipeline_model=DistilBertEncoder,
    tokenizer=EmbeddingsTokenizer,
    context_type=EmbeddingsContext,
    config=DistilBertConfig,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    multi_gpu_supported=True,
)
