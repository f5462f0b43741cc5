"""Any decoder of the installed `transformers` that no family of ours covers, with our attention and cache in it."""

from architectures.transformers_adapter.arch import adapter_arch

ARCHITECTURES = [adapter_arch]

__all__ = ["ARCHITECTURES", "adapter_arch"]
