"""The DeepSeek family: V2 and V3 (and R1, which is a V3)."""

from architectures.deepseek.arch import deepseek_v2_arch, deepseek_v3_arch

ARCHITECTURES = [deepseek_v2_arch, deepseek_v3_arch]

__all__ = ["ARCHITECTURES", "deepseek_v2_arch", "deepseek_v3_arch"]
