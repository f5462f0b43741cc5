"""The XLM-RoBERTa family of encoders, for embeddings, with RoBERTa and CamemBERT, whose network is the same."""

from architectures.xlm_roberta.arch import camembert_arch, roberta_arch, xlm_roberta_arch

ARCHITECTURES = [xlm_roberta_arch, roberta_arch, camembert_arch]

__all__ = ["ARCHITECTURES", "camembert_arch", "roberta_arch", "xlm_roberta_arch"]
