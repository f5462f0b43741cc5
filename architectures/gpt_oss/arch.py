"""The record of the gpt-oss family: data only."""

from __future__ import annotations

from architectures.gpt_oss.model import GptOssModel
from architectures.gpt_oss.weight_adapters import gguf_name_map, safetensors_name_map
from max_ray.interfaces import KVCacheStrategy, PipelineTask
from max_ray.pipelines.lib import RopeType, SupportedArchitecture, SupportedEncoding, TextTokenizer, WeightsFormat

gpt_oss_arch = SupportedArchitecture(
    name="GptOssForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["unsloth/gpt-oss-20b-BF16"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings={
        SupportedEncoding.bfloat16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float32: [KVCacheStrategy.PAGED],
    },
    pipeline_model=GptOssModel,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)
