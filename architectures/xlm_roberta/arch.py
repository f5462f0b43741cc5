"""The records of the XLM-RoBERTa family, and of what has the same network: data only."""

from __future__ import annotations

from dataclasses import replace

from architectures.xlm_roberta.model import XLMRobertaEncoder, XLMRobertaScorer
from architectures.xlm_roberta.model_config import RotaryConfig, XLMRobertaConfig
from architectures.xlm_roberta.weight_adapters import safetensors_name_map
from max_ray.interfaces import EmbeddingsContext, PipelineTask
from max_ray.pipelines.lib import (
    EmbeddingsTokenizer,
    PairTokenizer,
    SupportedArchitecture,
    SupportedEncoding,
    WeightsFormat,
)

xlm_roberta_arch = SupportedArchitecture(
    name="XLMRobertaModel",
    task=PipelineTask.EMBEDDINGS_GENERATION,
    example_repo_ids=["intfloat/multilingual-e5-base", "BAAI/bge-m3"],
    default_encoding=SupportedEncoding.float32,
    supported_encodings={
        SupportedEncoding.float32: [],
        SupportedEncoding.bfloat16: [],
        SupportedEncoding.float16: [],
    },
    pipeline_model=XLMRobertaEncoder,
    tokenizer=EmbeddingsTokenizer,
    context_type=EmbeddingsContext,
    config=XLMRobertaConfig,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: safetensors_name_map},
    multi_gpu_supported=True,
)

roberta_arch = replace(
    xlm_roberta_arch, name="RobertaModel", example_repo_ids=["sentence-transformers/all-distilroberta-v1"]
)

jina_v3_arch = replace(
    xlm_roberta_arch,
    name="JinaEmbeddingsV3Model",
    example_repo_ids=["jinaai/jina-embeddings-v3"],
    config=RotaryConfig,
    multi_gpu_supported=False,
)

camembert_arch = replace(
    xlm_roberta_arch, name="CamembertModel", example_repo_ids=["dangvantuan/sentence-camembert-base"]
)

xlm_roberta_scorer_arch = replace(
    xlm_roberta_arch,
    name="XLMRobertaForSequenceClassification",
    task=PipelineTask.SCORE,
    example_repo_ids=["BAAI/bge-reranker-v2-m3"],
    pipeline_model=XLMRobertaScorer,
    tokenizer=PairTokenizer,
)

roberta_scorer_arch = replace(
    xlm_roberta_scorer_arch,
    name="RobertaForSequenceClassification",
    example_repo_ids=["cross-encoder/stsb-roberta-base"],
)
