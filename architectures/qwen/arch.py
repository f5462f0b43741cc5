"""The records of the Qwen family: data only."""

from __future__ import annotations

from architectures.qwen.model import Qwen2Model, Qwen3Model
from architectures.qwen.weight_adapters import gguf_name_map, safetensors_name_map
from max_ray.interfaces import PipelineTask
from max_ray.interfaces.encoding import EVERY_ENCODING
from max_ray.pipelines.lib import RopeType, SupportedArchitecture, SupportedEncoding, TextTokenizer, WeightsFormat

qwen2_arch = SupportedArchitecture(
    name="Qwen2ForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=EVERY_ENCODING,
    pipeline_model=Qwen2Model,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)

qwen3_arch = SupportedArchitecture(
    name="Qwen3ForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=EVERY_ENCODING,
    pipeline_model=Qwen3Model,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)
