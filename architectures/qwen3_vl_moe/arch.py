"""The record of the Qwen3-VL mixtures of experts: data only."""

from __future__ import annotations

from architectures.qwen3_vl_moe.model import Qwen3VLMoeModel
from architectures.qwen3_vl_moe.weight_adapters import safetensors_name_map
from max_ray.images.tokenizer import ImageTextTokenizer
from max_ray.interfaces import KVCacheStrategy, PipelineTask
from max_ray.pipelines.lib import RopeType, SupportedArchitecture, SupportedEncoding, WeightsFormat

qwen3_vl_moe_arch = SupportedArchitecture(
    name="Qwen3VLMoeForConditionalGeneration",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["Qwen/Qwen3-VL-30B-A3B-Instruct"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings={
        SupportedEncoding.bfloat16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float32: [KVCacheStrategy.PAGED],
    },
    pipeline_model=Qwen3VLMoeModel,
    tokenizer=ImageTextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)
