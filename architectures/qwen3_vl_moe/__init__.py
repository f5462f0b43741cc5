"""The Qwen3-VL mixture of experts: a Qwen3 mixture of experts that sees images."""

from architectures.qwen3_vl_moe.arch import qwen3_vl_moe_arch

ARCHITECTURES = [qwen3_vl_moe_arch]

__all__ = ["ARCHITECTURES", "qwen3_vl_moe_arch"]
