"""The MPNet family of encoders, for embeddings."""

from architectures.mpnet.arch import mpnet_arch, mpnet_masked_lm_arch

ARCHITECTURES = [mpnet_arch, mpnet_masked_lm_arch]

__all__ = ["ARCHITECTURES", "mpnet_arch", "mpnet_masked_lm_arch"]
