"""The reference implementations: each defines its operation and runs on any torch device, tuned for CPUs."""

from max_ray.kernels.reference.activation import silu_and_mul
from max_ray.kernels.reference.argmax import argmax
from max_ray.kernels.reference.attention import paged_attention
from max_ray.kernels.reference.experts import sum_choices
from max_ray.kernels.reference.latent import append_latent, latent_attention
from max_ray.kernels.reference.lookup import decode_slots, gather_rows, positions, sum_rows
from max_ray.kernels.reference.norm import fused_add_rmsnorm, rmsnorm
from max_ray.kernels.reference.paged_cache import append_paged_kv_cache
from max_ray.kernels.reference.quantized import grouped_quantized_linear, quantized_linear, quantized_rows
from max_ray.kernels.reference.rope import apply_rope
from max_ray.kernels.reference.rope_append import rope_and_append

__all__ = [
    "append_latent",
    "append_paged_kv_cache",
    "apply_rope",
    "argmax",
    "decode_slots",
    "fused_add_rmsnorm",
    "gather_rows",
    "grouped_quantized_linear",
    "latent_attention",
    "paged_attention",
    "positions",
    "quantized_linear",
    "quantized_rows",
    "rmsnorm",
    "rope_and_append",
    "silu_and_mul",
    "sum_choices",
    "sum_rows",
]
