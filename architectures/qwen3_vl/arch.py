"""The record of the dense Qwen3-VL family: data only."""

from __future__ import annotations

from architectures.qwen3_vl.model import Qwen3VLModel
from architectures.qwen3_vl.weight_adapters import safetensors_name_map
from max_ray.images.tokenizer import ImageTextTokenizer
from max_ray.interfaces import KVCacheStrategy, PipelineTask
from max_ray.pipelines.lib import RopeType, SupportedArchitecture, SupportedEncoding, WeightsFormat

qwen3_vl_arch = SupportedArchitecture(
    name="Qwen3VLForConditionalGeneration",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-2B-Instruct"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings={
        SupportedEncoding.bfloat16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float32: [KVCacheStrategy.PAGED],
    },
    pipeline_model=Qwen3VLModel,
    tokenizer=ImageTextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)
