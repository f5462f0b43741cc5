"""The dense Qwen family: Qwen2 (and 2.5) and Qwen3, each as an embedder too, and Qwen3 as a reranker."""

from architectures.qwen.arch import (
    qwen2_arch,
    qwen2_embedder_arch,
    qwen3_arch,
    qwen3_embedder_arch,
    qwen3_judge_arch,
    qwen3_scorer_arch,
)

ARCHITECTURES = [
    *(qwen2_arch, qwen3_arch, qwen2_embedder_arch, qwen3_embedder_arch),
    *(qwen3_judge_arch, qwen3_scorer_arch),
]

__all__ = [
    "ARCHITECTURES",
    "qwen2_arch",
    "qwen2_embedder_arch",
    "qwen3_arch",
    "qwen3_embedder_arch",
    "qwen3_judge_arch",
    "qwen3_scorer_arch",
]
