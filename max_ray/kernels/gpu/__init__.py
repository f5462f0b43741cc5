"""The Triton kernels, for NVIDIA GPUs from compute capability 8.0. They need `triton`; nothing here loads without it.

Each is held against its reference in Triton's interpreter (`tests/kernels/gpu`) and compiled for sm_90. The reference
of `sample` is `max_ray/engine/sampling/draw.py`, so that it is reached from here and not through `max_ray.kernels`.
"""

from max_ray.kernels.gpu.activation import silu_and_mul
from max_ray.kernels.gpu.attention import paged_attention
from max_ray.kernels.gpu.experts import sum_choices
from max_ray.kernels.gpu.latent import append_latent, latent_attention
from max_ray.kernels.gpu.norm import fused_add_rmsnorm, rmsnorm
from max_ray.kernels.gpu.paged_cache import append_paged_kv_cache
from max_ray.kernels.gpu.quantized import grouped_quantized_linear, quantized_linear
from max_ray.kernels.gpu.rope import apply_rope, rope_and_append
from max_ray.kernels.gpu.sampling import sample

__all__ = [
    "append_latent",
    "append_paged_kv_cache",
    "apply_rope",
    "fused_add_rmsnorm",
    "grouped_quantized_linear",
    "latent_attention",
    "paged_attention",
    "quantized_linear",
    "rmsnorm",
    "rope_and_append",
    "sample",
    "silu_and_mul",
    "sum_choices",
]
