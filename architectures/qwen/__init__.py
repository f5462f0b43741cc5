"""The dense Qwen family: Qwen2 (and 2.5) and Qwen3."""

from architectures.qwen.arch import qwen2_arch, qwen3_arch

ARCHITECTURES = [qwen2_arch, qwen3_arch]

__all__ = ["ARCHITECTURES", "qwen2_arch", "qwen3_arch"]
