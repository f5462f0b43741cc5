"""The record of the BERT family: data only."""

from __future__ import annotations

from dataclasses import replace

from architectures.bert.model import BertEncoder, BertScorer
from architectures.bert.model_config import BertConfig
from architectures.bert.weight_adapters import gguf_name_map, safetensors_name_map
from max_ray.interfaces import EmbeddingsContext, PipelineTask
from max_ray.pipelines.lib import (
    EmbeddingsTokenizer,
    PairTokenizer,
    SupportedArchitecture,
    SupportedEncoding,
    WeightsFormat,
)

bert_arch = SupportedArchitecture(
    name="BertModel",
    task=PipelineTask.EMBEDDINGS_GENERATION,
    example_repo_ids=["sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-base-en-v1.5"],
    default_encoding=SupportedEncoding.float32,
    supported_encodings={
        SupportedEncoding.float32: [],
        SupportedEncoding.bfloat16: [],
        SupportedEncoding.float16: [],
    },
    pipeline_model=BertEncoder,
    tokenizer=EmbeddingsTokenizer,
    context_type=EmbeddingsContext,
    config=BertConfig,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map, WeightsFormat.gguf: gguf_name_map},
    multi_gpu_supported=True,
)

bert_scorer_arch = replace(
    bert_arch,
    name="BertForSequenceClassification",
    task=PipelineTask.SCORE,
    example_repo_ids=["cross-encoder/ms-marco-MiniLM-L6-v2"],
    pipeline_model=BertScorer,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    tokenizer=PairTokenizer,
)
