"""The record of the Qwen3 mixture-of-experts family: data only."""

from __future__ import annotations

from architectures.qwen3_moe.model import Qwen3MoeModel
from architectures.qwen3_moe.weight_adapters import gguf_name_map, safetensors_name_map
from max_ray.interfaces import PipelineTask
from max_ray.interfaces.encoding import EVERY_ENCODING
from max_ray.pipelines.lib import RopeType, SupportedArchitecture, SupportedEncoding, TextTokenizer, WeightsFormat

qwen3_moe_arch = SupportedArchitecture(
    name="Qwen3MoeForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["Qwen/Qwen3-30B-A3B"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=EVERY_ENCODING,
    pipeline_model=Qwen3MoeModel,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)
