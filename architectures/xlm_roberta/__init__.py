"""The XLM-RoBERTa family of encoders, for embeddings and scores, with RoBERTa and CamemBERT: one network;
and Jina embeddings v3, which has a rope."""

from architectures.xlm_roberta.arch import (
    camembert_arch,
    jina_v3_arch,
    roberta_arch,
    roberta_scorer_arch,
    xlm_roberta_arch,
    xlm_roberta_scorer_arch,
)

ARCHITECTURES = [
    xlm_roberta_arch,
    roberta_arch,
    camembert_arch,
    jina_v3_arch,
    xlm_roberta_scorer_arch,
    roberta_scorer_arch,
]

__all__ = [
    "ARCHITECTURES",
    "camembert_arch",
    "jina_v3_arch",
    "roberta_arch",
    "roberta_scorer_arch",
    "xlm_roberta_arch",
    "xlm_roberta_scorer_arch",
]
