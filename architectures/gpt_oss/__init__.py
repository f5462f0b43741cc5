"""The gpt-oss family."""

from architectures.gpt_oss.arch import gpt_oss_arch

ARCHITECTURES = [gpt_oss_arch]

__all__ = ["ARCHITECTURES", "gpt_oss_arch"]
