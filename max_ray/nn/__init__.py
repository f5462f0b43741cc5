"""Layers: the plain ones, and those that a tensor-parallel group holds together. Forward passes only, no training."""

from max_ray.nn.attention import Attention
from max_ray.nn.embedding import ParallelLMHead, VocabParallelEmbedding
from max_ray.nn.forward_batch import ForwardBatch
from max_ray.nn.latent_attention import LatentAttention, LatentAttentionShape
from max_ray.nn.linear import (
    ColumnParallelLinear,
    LayerWeight,
    Linear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    pack_weights,
)
from max_ray.nn.mlp import GatedMLP
from max_ray.nn.module import Module, Parameter
from max_ray.nn.moe import (
    Experts,
    grouped_matmul,
    grouped_matmul_waits,
    keep_best_groups,
    run_by_expert,
    softmax_top_k,
)
from max_ray.nn.norm import RMSNorm
from max_ray.nn.rope import RopeConfig, RotaryEmbedding
from max_ray.nn.transformer import Transformer, TransformerBlock

__all__ = [
    "Attention",
    "ColumnParallelLinear",
    "Experts",
    "ForwardBatch",
    "GatedMLP",
    "LatentAttention",
    "LatentAttentionShape",
    "LayerWeight",
    "Linear",
    "MergedColumnParallelLinear",
    "Module",
    "ParallelLMHead",
    "Parameter",
    "QKVParallelLinear",
    "RMSNorm",
    "RopeConfig",
    "RotaryEmbedding",
    "RowParallelLinear",
    "Transformer",
    "TransformerBlock",
    "VocabParallelEmbedding",
    "grouped_matmul",
    "grouped_matmul_waits",
    "keep_best_groups",
    "pack_weights",
    "run_by_expert",
    "softmax_top_k",
]
