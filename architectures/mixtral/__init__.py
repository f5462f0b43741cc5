"""The Mixtral family."""

from architectures.mixtral.arch import mixtral_arch

ARCHITECTURES = [mixtral_arch]

__all__ = ["ARCHITECTURES", "mixtral_arch"]
