"""The dense Qwen3-VL family: a Qwen3 that sees images."""

from architectures.qwen3_vl.arch import qwen3_vl_arch

ARCHITECTURES = [qwen3_vl_arch]

__all__ = ["ARCHITECTURES", "qwen3_vl_arch"]
