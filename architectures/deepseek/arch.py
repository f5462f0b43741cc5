"""The records of the DeepSeek family: data only."""

from __future__ import annotations

from architectures.deepseek.model import DeepseekV2Model, DeepseekV3Model
from architectures.deepseek.weight_adapters import gguf_name_map, safetensors_name_map
from max_ray.interfaces import PipelineTask
from max_ray.interfaces.encoding import EVERY_ENCODING
from max_ray.pipelines.lib import RopeType, SupportedArchitecture, SupportedEncoding, TextTokenizer, WeightsFormat

deepseek_v2_arch = SupportedArchitecture(
    name="DeepseekV2ForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["deepseek-ai/DeepSeek-V2-Lite-Chat"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=EVERY_ENCODING,
    pipeline_model=DeepseekV2Model,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    rope_type=RopeType.normal,
    multi_gpu_supported=True,
)

deepseek_v3_arch = SupportedArchitecture(
    name="DeepseekV3ForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=EVERY_ENCODING,
    pipeline_model=DeepseekV3Model,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    rope_type=RopeType.normal,
    multi_gpu_supported=True,
)
