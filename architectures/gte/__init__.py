"""The GTE v1.5 family of encoders (published as `NewModel`), for embeddings."""

from architectures.gte.arch import gte_arch

ARCHITECTURES = [gte_arch]

__all__ = ["ARCHITECTURES", "gte_arch"]
