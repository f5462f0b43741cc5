"""The Gemma 3 family, text only, as an embedder too."""

from architectures.gemma3.arch import gemma3_arch, gemma3_embedder_arch

ARCHITECTURES = [gemma3_arch, gemma3_embedder_arch]

__all__ = ["ARCHITECTURES", "gemma3_arch", "gemma3_embedder_arch"]
