"""The BERT family of encoders, for embeddings."""

from architectures.bert.arch import bert_arch

ARCHITECTURES = [bert_arch]

__all__ = ["ARCHITECTURES", "bert_arch"]
