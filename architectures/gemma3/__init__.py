"""The Gemma 3 family, text only."""

from architectures.gemma3.arch import gemma3_arch

ARCHITECTURES = [gemma3_arch]

__all__ = ["ARCHITECTURES", "gemma3_arch"]
