"""The Nomic BERT family of encoders, for embeddings."""

from architectures.nomic_bert.arch import nomic_bert_arch

ARCHITECTURES = [nomic_bert_arch]

__all__ = ["ARCHITECTURES", "nomic_bert_arch"]
