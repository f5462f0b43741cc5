"""The dense Qwen family: Qwen2 (and 2.5) and Qwen3, each as an embedder too."""

from architectures.qwen.arch import qwen2_arch, qwen2_embedder_arch, qwen3_arch, qwen3_embedder_arch

ARCHITECTURES = [qwen2_arch, qwen3_arch, qwen2_embedder_arch, qwen3_embedder_arch]

__all__ = ["ARCHITECTURES", "qwen2_arch", "qwen2_embedder_arch", "qwen3_arch", "qwen3_embedder_arch"]
