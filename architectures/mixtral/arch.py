"""The record of the Mixtral family: data only."""

from __future__ import annotations

from architectures.mixtral.model import MixtralModel
from architectures.mixtral.weight_adapters import gguf_name_map, safetensors_name_map
from max_ray.interfaces import PipelineTask
from max_ray.interfaces.encoding import EVERY_ENCODING
from max_ray.pipelines.lib import RopeType, SupportedArchitecture, SupportedEncoding, TextTokenizer, WeightsFormat

mixtral_arch = SupportedArchitecture(
    name="MixtralForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["mistralai/Mixtral-8x7B-Instruct-v0.1"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=EVERY_ENCODING,
    pipeline_model=MixtralModel,
    tokenizer=TextTokenizer,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)
