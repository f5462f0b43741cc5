"""The XLM-RoBERTa family of encoders, for embeddings and scores, with RoBERTa and CamemBERT: one network."""

from architectures.xlm_roberta.arch import (
    camembert_arch,
    roberta_arch,
    roberta_scorer_arch,
    xlm_roberta_arch,
    xlm_roberta_scorer_arch,
)

ARCHITECTURES = [xlm_roberta_arch, roberta_arch, camembert_arch, xlm_roberta_scorer_arch, roberta_scorer_arch]

__all__ = [
    "ARCHITECTURES",
    "camembert_arch",
    "roberta_arch",
    "roberta_scorer_arch",
    "xlm_roberta_arch",
    "xlm_roberta_scorer_arch",
]
