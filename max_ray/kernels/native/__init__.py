"""The C++ kernels for CPUs, and packed weights. Compiled on the first use by the machine's compiler; never required."""

from max_ray.kernels.native.build import library
from max_ray.kernels.native.ops import (
    append_latent,
    append_paged_kv_cache,
    apply_rope,
    argmax,
    decode_slots,
    fused_add_rmsnorm,
    gather_rows,
    latent_attention,
    paged_attention,
    positions,
    rmsnorm,
    rope_and_append,
    silu_and_mul,
    sum_choices,
    sum_rows,
)
from max_ray.kernels.native.packed import PackedWeight, new_packed, pack_weight
from max_ray.kernels.native.quantized import grouped_quantized_linear, quantized_linear
from max_ray.kernels.native.tiling import new_matrix, tile_blocks, tile_file

__all__ = [
    "PackedWeight",
    "append_latent",
    "append_paged_kv_cache",
    "apply_rope",
    "argmax",
    "decode_slots",
    "fused_add_rmsnorm",
    "gather_rows",
    "grouped_quantized_linear",
    "latent_attention",
    "library",
    "new_matrix",
    "new_packed",
    "pack_weight",
    "paged_attention",
    "positions",
    "quantized_linear",
    "rmsnorm",
    "rope_and_append",
    "silu_and_mul",
    "sum_choices",
    "sum_rows",
    "tile_blocks",
    "tile_file",
]
