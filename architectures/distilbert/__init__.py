"""The DistilBERT family of encoders, for embeddings."""

from architectures.distilbert.arch import distilbert_arch

ARCHITECTURES = [distilbert_arch]

__all__ = ["ARCHITECTURES", "distilbert_arch"]
