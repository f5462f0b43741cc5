"""The record of the Llama family: data only."""

from __future__ import annotations

from architectures.llama3.model import Llama3Model
from architectures.llama3.weight_adapters import gguf_name_map, safetensors_name_map
from max_ray.interfaces import KVCacheStrategy, PipelineTask
from max_ray.pipelines.lib import RopeType, SupportedArchitecture, SupportedEncoding, TextTokenizer, WeightsFormat

llama_arch = SupportedArchitecture(
    name="LlamaForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings={
        SupportedEncoding.bfloat16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float32: [KVCacheStrategy.PAGED],
        SupportedEncoding.q4_k: [KVCacheStrategy.PAGED],
        SupportedEncoding.q4_0: [KVCacheStrategy.PAGED],
        SupportedEncoding.q4_1: [KVCacheStrategy.PAGED],
        SupportedEncoding.q5_k: [KVCacheStrategy.PAGED],
        SupportedEncoding.q6_k: [KVCacheStrategy.PAGED],
        SupportedEncoding.q8_0: [KVCacheStrategy.PAGED],
        SupportedEncoding.float8_e4m3fn: [KVCacheStrategy.PAGED],
        SupportedEncoding.gptq: [KVCacheStrategy.PAGED],
        SupportedEncoding.awq: [KVCacheStrategy.PAGED],
    },
    pipeline_model=Llama3Model,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)
