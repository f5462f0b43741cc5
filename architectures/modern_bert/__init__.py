"""The ModernBERT family of encoders, for embeddings."""

from architectures.modern_bert.arch import modern_bert_arch

ARCHITECTURES = [modern_bert_arch]

__all__ = ["ARCHITECTURES", "modern_bert_arch"]
