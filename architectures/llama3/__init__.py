"""The Llama family (Llama 2 and 3, and checkpoints of the same shape)."""

from architectures.llama3.arch import llama_arch

ARCHITECTURES = [llama_arch]

__all__ = ["ARCHITECTURES", "llama_arch"]
