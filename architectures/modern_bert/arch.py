"""The record of the ModernBERT family: data only. One device: its fused products are not cut over ranks."""

from __future__ import annotations

from architectures.modern_bert.model import ModernBertEncoder
from architectures.modern_bert.model_config import ModernBertConfig
from architectures.modern_bert.weight_adapters import gguf_name_map, safetensors_name_map
from max_ray.interfaces import EmbeddingsContext, PipelineTask
from max_ray.pipelines.lib import (
    EmbeddingsTokenizer,
    RopeType,
    SupportedArchitecture,
    SupportedEncoding,
    WeightsFormat,
)

modern_bert_arch = SupportedArchitecture(
    name="ModernBertModel",
    task=PipelineTask.EMBEDDINGS_GENERATION,
    example_repo_ids=["nomic-ai/modernbert-embed-base", "Alibaba-NLP/gte-modernbert-base"],
    default_encoding=SupportedEncoding.float32,
    supported_encodings={
        SupportedEncoding.float32: [],
        SupportedEncoding.bfloat16: [],
        SupportedEncoding.float16: [],
    },
    pipeline_model=ModernBertEncoder,
    tokenizer=EmbeddingsTokenizer,
    context_type=EmbeddingsContext,
    config=ModernBertConfig,
    rope_type=RopeType.neox,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    multi_gpu_supported=False,
)
