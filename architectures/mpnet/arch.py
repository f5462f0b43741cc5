"""The records of the MPNet family: data only. Sentence models keep the class name that they were trained under."""

from __future__ import annotations

from dataclasses import replace

from architectures.mpnet.model import MPNetEncoder
from architectures.mpnet.model_config import MPNetConfig
from architectures.mpnet.weight_adapters import safetensors_name_map
from max_ray.interfaces import EmbeddingsContext, PipelineTask
from max_ray.pipelines.lib import EmbeddingsTokenizer, SupportedArchitecture, SupportedEncoding, WeightsFormat

mpnet_arch = SupportedArchitecture(
    name="MPNetModel",
    task=PipelineTask.EMBEDDINGS_GENERATION,
    example_repo_ids=["sentence-transformers/multi-qa-mpnet-base-dot-v1"],
    default_encoding=SupportedEncoding.float32,
    supported_encodings={
        SupportedEncoding.float32: [],
        SupportedEncoding.bfloat16: [],
        SupportedEncoding.float16: [],
    },
    pipeline_model=MPNetEncoder,
    tokenizer=EmbeddingsTokenizer,
    context_type=EmbeddingsContext,
    config=MPNetConfig,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    multi_gpu_supported=True,
)

mpnet_masked_lm_arch = replace(
    mpnet_arch, name="MPNetForMaskedLM", example_repo_ids=["sentence-transformers/all-mpnet-base-v2"]
)
