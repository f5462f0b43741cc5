"""The records of the Mistral family: data only."""

from __future__ import annotations

from architectures.mistral.model import MinistralModel, MistralModel
from architectures.mistral.weight_adapters import safetensors_name_map
from max_ray.interfaces import KVCacheStrategy, PipelineTask
from max_ray.pipelines.lib import RopeType, SupportedArchitecture, SupportedEncoding, TextTokenizer, WeightsFormat

_ENCODINGS = {
    SupportedEncoding.bfloat16: [KVCacheStrategy.PAGED],
    SupportedEncoding.float16: [KVCacheStrategy.PAGED],
    SupportedEncoding.float32: [KVCacheStrategy.PAGED],
}

mistral_arch = SupportedArchitecture(
    name="MistralForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.1"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=_ENCODINGS,
    pipeline_model=MistralModel,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)

ministral_arch = SupportedArchitecture(
    name="MinistralForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["mistralai/Ministral-8B-Instruct-2410"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=_ENCODINGS,
    pipeline_model=MinistralModel,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)
