"""The BERT family of encoders, for embeddings and for scores."""

from architectures.bert.arch import bert_arch, bert_scorer_arch

ARCHITECTURES = [bert_arch, bert_scorer_arch]

__all__ = ["ARCHITECTURES", "bert_arch", "bert_scorer_arch"]
