"""The record of the adapter: data only. The registry falls back to it where no family of ours has a name."""

from __future__ import annotations

from architectures.transformers_adapter.model import TransformersAdapterModel
from max_ray.interfaces import KVCacheStrategy, PipelineTask
from max_ray.pipelines.lib import SupportedArchitecture, SupportedEncoding, TextTokenizer, WeightsFormat

adapter_arch = SupportedArchitecture(
    name="TransformersForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["allenai/OLMo-2-0425-1B", "bigcode/starcoder2-3b"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings={
        SupportedEncoding.bfloat16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float32: [KVCacheStrategy.PAGED],
    },
    pipeline_model=TransformersAdapterModel,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    multi_gpu_supported=True,
)
