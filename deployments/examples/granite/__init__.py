"""An example of a model family of one's own: IBM's Granite 3 as a folder outside of max_ray.

max-ray check deployments/examples/granite --model-path DIR
max-ray serve --custom-architectures deployments/examples/granite --model-path DIR
"""

from __future__ import annotations

from architectures.llama3.weight_adapters import safetensors_name_map
from max_ray.interfaces import KVCacheStrategy, PipelineTask
from max_ray.pipelines.lib import SupportedArchitecture, SupportedEncoding, TextTokenizer, WeightsFormat

from .granite import GraniteModel

granite_arch = SupportedArchitecture(
    name="GraniteForCausalLM",
    task=PipelineTask.TEXT_GENERATION,
    example_repo_ids=["ibm-granite/granite-3.3-2b-instruct"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings={
        SupportedEncoding.bfloat16: [KVCacheStrategy.PAGED],
        SupportedEncoding.float32: [KVCacheStrategy.PAGED],
    },
    pipeline_model=GraniteModel,
    tokenizer=TextTokenizer,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    multi_gpu_supported=True,
)

ARCHITECTURES = [granite_arch]
