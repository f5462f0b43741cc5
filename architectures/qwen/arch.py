"""The records of the Qwen family: data only."""

from __future__ import annotations

from dataclasses import replace

from architectures.qwen.model import Qwen2Embedder, Qwen2Model, Qwen3Embedder, Qwen3Judge, Qwen3Model, Qwen3Scorer
from architectures.qwen.weight_adapters import (
    embedder_name_map,
    gguf_embedder_name_map,
    gguf_name_map,
    safetensors_name_map,
)
from max_ray.interfaces import EmbeddingsContext, KVCacheStrategy, PipelineTask
from max_ray.interfaces.encoding import EVERY_ENCODING
from max_ray.pipelines.lib import (
    EmbeddingsTokenizer,
    JudgeTokenizer,
    RopeType,
    SupportedArchitecture,
    SupportedEncoding,
    TextTokenizer,
    WeightsFormat,
)

_PLAIN_ENCODINGS = {
    SupportedEncoding.bfloat16: [KVCacheStrategy.PAGED],
    SupportedEncoding.float16: [KVCacheStrategy.PAGED],
    SupportedEncoding.float32: [KVCacheStrategy.PAGED],
}

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

qwen3_embedder_arch = SupportedArchitecture(
    name="Qwen3ForCausalLM",
    task=PipelineTask.EMBEDDINGS_GENERATION,
    example_repo_ids=["Qwen/Qwen3-Embedding-0.6B", "Qwen/Qwen3-Embedding-8B"],
    default_encoding=SupportedEncoding.bfloat16,
    supported_encodings=EVERY_ENCODING,
    pipeline_model=Qwen3Embedder,
    tokenizer=EmbeddingsTokenizer,
    context_type=EmbeddingsContext,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: embedder_name_map, WeightsFormat.gguf: gguf_embedder_name_map},
    rope_type=RopeType.neox,
    multi_gpu_supported=True,
)

qwen2_embedder_arch = replace(
    qwen3_embedder_arch,
    name="Qwen2ForCausalLM",
    example_repo_ids=["Alibaba-NLP/gte-Qwen2-1.5B-instruct", "Alibaba-NLP/gte-Qwen2-7B-instruct"],
    pipeline_model=Qwen2Embedder,
)

qwen3_judge_arch = replace(
    qwen3_embedder_arch,
    task=PipelineTask.SCORE,
    example_repo_ids=["Qwen/Qwen3-Reranker-0.6B"],
    supported_encodings=_PLAIN_ENCODINGS,
    pipeline_model=Qwen3Judge,
    tokenizer=JudgeTokenizer,
    weight_adapters={WeightsFormat.safetensors: embedder_name_map},
)

qwen3_scorer_arch = replace(
    qwen3_judge_arch,
    name="Qwen3ForSequenceClassification",
    example_repo_ids=["tomaarsen/Qwen3-Reranker-0.6B-seq-cls"],
    pipeline_model=Qwen3Scorer,
)
