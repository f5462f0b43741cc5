"""The XLM-RoBERTa family of encoders, for embeddings."""

from architectures.xlm_roberta.arch import xlm_roberta_arch

ARCHITECTURES = [xlm_roberta_arch]

__all__ = ["ARCHITECTURES", "xlm_roberta_arch"]
