"""The record of the GTE v1.5 family: data only. One device: its fused products are not cut over ranks."""

from __future__ import annotations

from architectures.gte.model import GteEncoder
from architectures.gte.model_config import GteConfig
from architectures.gte.weight_adapters import safetensors_name_map
from max_ray.interfaces import EmbeddingsContext, PipelineTask
from max_ray.pipelines.lib import EmbeddingsTokenizer, SupportedArchitecture, SupportedEncoding, WeightsFormat

gte_arch = SupportedArchitecture(
    name="GteModel",
    task=PipelineTask.EMBEDDINGS_GENERATION,
    example_repo_ids=["Alibaba-NLP/gte-multilingual-base", "Alibaba-NLP/gte-large-en-v1.5"],
    default_encoding=SupportedEncoding.float32,
    supported_encodings={
        SupportedEncoding.float32: [],
        SupportedEncoding.bfloat16: [],
        SupportedEncoding.float16: [],
    },
    pipeline_model=GteEncoder,
    tokenizer=EmbeddingsTokenizer,
    context_type=EmbeddingsContext,
    config=GteConfig,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    multi_gpu_supported=False,
)
