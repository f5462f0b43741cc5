"""The Mistral family: Mistral, and Ministral with its layers of two kinds."""

from architectures.mistral.arch import ministral_arch, mistral_arch, mistral_embedder_arch

ARCHITECTURES = [mistral_arch, ministral_arch, mistral_embedder_arch]

__all__ = ["ARCHITECTURES", "ministral_arch", "mistral_arch", "mistral_embedder_arch"]
