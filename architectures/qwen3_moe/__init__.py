"""The Qwen3 mixture-of-experts family."""

from architectures.qwen3_moe.arch import qwen3_moe_arch

ARCHITECTURES = [qwen3_moe_arch]

__all__ = ["ARCHITECTURES", "qwen3_moe_arch"]
