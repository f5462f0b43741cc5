"""The operations that networks are built of: one public function each, named as FlashInfer names them.

Axes: T tokens of a ragged batch, B rows (requests), D head_dim or hidden size, H query heads, KVH key/value heads,
F feed-forward width. A *backend* implements every function with the same signature. `kernels/reference` (torch)
defines the result and runs on any device, `kernels/gpu` (Triton) runs on GPUs, `kernels/native` (C++) on CPUs with a
compiler. `_backend` below chooses by where the tensors are.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from max_ray.kernels import reference
from max_ray.log import get_logger

if TYPE_CHECKING:
    from max_ray.interfaces.model_inputs import KVCacheInputs
    from max_ray.kernels.native import PackedWeight
    from max_ray.kernels.quantized import PackedMatrix

__all__ = [
    "append_latent",
    "append_paged_kv_cache",
    "apply_rope",
    "argmax",
    "decode_slots",
    "fused_add_rmsnorm",
    "gather_rows",
    "grouped_quantized_linear",
    "interpret_on_cpu",
    "is_interpreted",
    "latent_attention",
    "multiplies_groups",
    "new_matrix",
    "new_packed",
    "pack_weight",
    "paged_attention",
    "positions",
    "quantized_linear",
    "quantized_rows",
    "rmsnorm",
    "rope_and_append",
    "silu_and_mul",
    "sum_choices",
    "sum_rows",
    "tile_blocks",
]

_logger = get_logger(__name__)


_interpreted = False


def interpret_on_cpu() -> None:
    """From now on computes CPU tensors with the Triton kernels, in Triton's interpreter: the rehearsal of a GPU. The
    process must have started with TRITON_INTERPRET=1."""
    global _interpreted
    _interpreted = True
    _cpu_backend.cache_clear()


def is_interpreted() -> bool:
    """Whether `interpret_on_cpu` was called."""
    return _interpreted


def _backend(x: torch.Tensor) -> ModuleType:
    return _gpu_backend() if x.is_cuda or _interpreted else _cpu_backend()


@cache
def _cpu_backend() -> ModuleType:
    """The C++ kernels where they can be had, loaded (at the first time: compiled) when the first tensor comes."""
    if _interpreted:
        return reference
    from max_ray.kernels import native

    return reference if native.library() is None else native


@cache
def _gpu_backend() -> ModuleType:
    """The Triton kernels, loaded when the first tensor on a GPU comes: a machine without triton never gets here."""
    if find_spec("triton") is None:
        _logger.warning("triton is not installed: the GPU runs torch's own operations, which are slower")
        return reference
    return import_module("max_ray.kernels.gpu")


def has_native() -> bool:
    """Whether CPU tensors are computed by the C++ kernels."""
    return _cpu_backend() is not reference


def pack_weight(weight: torch.Tensor) -> PackedWeight | None:
    """A linear layer's weight [O, I] in the form that the CPU's C++ kernel reads fastest; None without such a form."""
    if weight.device.type != "cpu" or not has_native():
        return None
    from max_ray.kernels.native import pack_weight as pack

    return pack(weight)


def new_packed(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> PackedWeight | None:
    """`pack_weight` for a weight that is still to come: zeros, to be written in multiples of `PackedWeight.PANEL` rows,
    by several threads if one likes. None as there."""
    if device.type != "cpu" or not has_native():
        return None
    from max_ray.kernels import native

    return native.new_packed(shape, dtype)


def new_matrix(type_name: str, rows: int, columns: int) -> PackedMatrix | None:
    """A CPU's matrix of zeros for `tile_blocks`; None for a GGUF type without tiles, and without a compiler."""
    if not type_name or not has_native():
        return None
    from max_ray.kernels import native

    return native.new_matrix(type_name, rows, columns)


def tile_blocks(type_name: str, blocks: torch.Tensor, matrix: PackedMatrix, first_tile: int) -> bool:
    """Writes blocks of a GGUF file, uint8 [R, blocks a row, bytes a block], into a `new_matrix` from a tile on. In one
    thread, and without the interpreter's lock: loading has threads for several matrices. Gives whether all scales are
    finite."""
    from max_ray.kernels import native

    return native.tile_blocks(type_name, blocks, matrix, first_tile)


def tile_file(
    type_name: str,
    place: tuple[str, int, int, int],
    rows: int,
    matrix: PackedMatrix,
    first_tile: int,
    buffer: torch.Tensor,
) -> bool | None:
    """`tile_blocks` of rows that lie in a file one after another: see `native.tiling.tile_file`."""
    from max_ray.kernels import native

    return native.tile_file(type_name, place, rows, matrix, first_tile, buffer)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] / rms(x) * weight [D] -> [..., D].

    Zhang and Sennrich 2019, eq. 4. Normalised in float32, rounded to x's dtype, then multiplied by `weight`.
    """
    result: torch.Tensor = _backend(x).rmsnorm(x, weight, eps)
    return result


def fused_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rmsnorm(x + residual), x + residual), each [T, D]. The sum is rounded to x's dtype first."""
    result: tuple[torch.Tensor, torch.Tensor] = _backend(x).fused_add_rmsnorm(x, residual, weight, eps)
    return result


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x = [gate | up], [..., 2F] -> [..., F]."""
    result: torch.Tensor = _backend(x).silu_and_mul(x)
    return result


def argmax(x: torch.Tensor) -> torch.Tensor:
    """[N, V] -> int64 [N]: where each row's largest number is; the first of several. (Rows with NaN: some index.)

    On a GPU torch's own operation serves.
    """
    result: torch.Tensor = (reference if x.is_cuda else _cpu_backend()).argmax(x)
    return result


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [N, D], rows int64 [n] in [0, N) -> [n, D]. On a GPU torch's own operation serves."""
    result: torch.Tensor = (reference if x.is_cuda else _cpu_backend()).gather_rows(x, rows)
    return result


def sum_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Writes rows[0] + rows[1] + ... of rows [N, W] into out [W], added in this order; halves in float32, rounded once.

    On a CPU only. An element's sum does not depend on W.
    """
    _cpu_backend().sum_rows(rows, out)


def decode_slots(block_tables: torch.Tensor, cache_lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """The slot of the one new token of each row, int64 [B]: block * page_size + offset of position cache_lengths[b].

    block_tables: int32 [B, W]. cache_lengths: int32 [B]. On a GPU torch's own operations serve.
    """
    backend = reference if cache_lengths.is_cuda else _cpu_backend()
    result: torch.Tensor = backend.decode_slots(block_tables, cache_lengths, page_size)
    return result


def positions(cache_lengths: torch.Tensor) -> torch.Tensor:
    """The position of the one new token of each row: cache_lengths int32 [B] as int64 [B]."""
    result: torch.Tensor = (reference if cache_lengths.is_cuda else _cpu_backend()).positions(cache_lengths)
    return result


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q [T, H, D] and k [T, KVH, D] by their positions; new tensors, the inputs stay.

    cos_sin_cache: [max_len, R], best in float32 (it is rounded to q's dtype): R/2 cosines, then R/2 sines, of the
        angles of the R/2 pairs; R <= D, and the last D - R values of a head pass through.
    positions: int [T], the rows of the cache; None: the cache has one row a token, in order ([T, R]), for callers
        that gather once a step rather than once a layer.
    interleaved: pair i is (2i, 2i + 1) (RopeType.normal, GGUF); otherwise (i, i + R/2) (neox, Hugging Face).
    """
    result: tuple[torch.Tensor, torch.Tensor] = _backend(q).apply_rope(
        q, k, cos_sin_cache, positions, interleaved=interleaved
    )
    return result


def append_paged_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes k, v [T, KVH, D] into caches [num_blocks, page_size, KVH, D], in place.

    slot_mapping: int64 [T], block_id * page_size + offset; no slot twice.
    """
    _backend(k).append_paged_kv_cache(k, v, k_cache, v_cache, slot_mapping)


def rope_and_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """`apply_rope` and `append_paged_kv_cache` of the rotated keys in one: returns the rotated q [T, H, D], new.

    k, v [T, KVH, D] stay as they are; the caches are written in place. Arguments as of those two.
    """
    targets = (k_cache, v_cache, cos_sin_cache, positions, slot_mapping)
    result: torch.Tensor = _backend(q).rope_and_append(q, k, v, *targets, interleaved=interleaved)
    return result


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv: KVCacheInputs,
    qo_indptr: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch over the paged cache; q [T, H, D] -> [T, H, D].

    Row b has n_b = qo_indptr[b + 1] - qo_indptr[b] new tokens behind kv.cache_lengths[b] earlier ones; the keys and
    values of both are in the cache already. Its i-th query sees the keys 0 .. cache_lengths[b] + i. Prefill, chunk and
    decode rows mix freely; a row may be empty. H is a multiple of KVH: query head h reads key head h * KVH // H.

    k_cache, v_cache: one layer's [num_blocks, page_size, KVH, D] (of `kv`: block_tables, cache_lengths, page_size).
    scale: multiplies q k^T. sliding_window: a query sees its own and the `sliding_window - 1` keys before it.
    logit_softcap: scores s become logit_softcap * tanh(s / logit_softcap), after `scale` and before the softmax
        (Gemma Team 2024, "Gemma 2", section 2); positive.
    sinks: [H], a score beside those of the keys in the softmax of each head, without a value (gpt-oss, OpenAI 2025);
        not together with a soft cap.
    """
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "logit_softcap": logit_softcap}
    result: torch.Tensor = _backend(q).paged_attention(q, k_cache, v_cache, kv, qo_indptr, **options, sinks=sinks)
    return result


def append_latent(latent: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Writes latent [T, C] into a cache of latents [num_blocks, page_size, 1, C], in place. slot_mapping: as of
    `append_paged_kv_cache`. On a CPU the reference implementation serves."""
    _backend(latent).append_latent(latent, cache, slot_mapping)


def latent_attention(
    q: torch.Tensor, cache: torch.Tensor, kv: KVCacheInputs, qo_indptr: torch.Tensor, *, up: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of H heads over a paged cache of latents that they share (DeepSeek-AI 2024, "DeepSeek-V2",
    section 2.1): q [T, H, P + R] -> [T, H, V]. Rows as in `paged_attention`; kv.slot_mapping: where the
    T tokens are.

    cache: [num_blocks, page_size, 1, L + R], a token's latent and its rotated rope key. up: [H, P + V, L]; head h has
    the key [up[h, :P] latent | rope key] and the value up[h, P:] latent. scale: multiplies q k^T.
    The C++ kernel takes an L + R that is a multiple of 16.
    """
    result: torch.Tensor = _backend(q).latent_attention(q, cache, kv, qo_indptr, up=up, scale=scale)
    return result


def sum_choices(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum over k of weights[t, k] * y[places[t, k]], in float32 and in the order of k: y [M, D] -> [T, D] in y's dtype.

    places: int64 [T, K]. weights: [T, K].
    """
    result: torch.Tensor = _backend(y).sum_choices(y, places, weights)
    return result


def quantized_linear(x: torch.Tensor, weight: PackedMatrix, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] @ weight [N, K]^T -> [..., N] in x's dtype; products and sums in float32.

    out: [T, N], columns of a wider matrix too, for x [T, K]; written and returned.
    On a CPU that multiplies bytes, bfloat16 inputs are rounded to 8 bits in groups of 32 (see `native.quantized`).
    On a GPU, weights are rounded to x's dtype where there are more rows than 16 (see `gpu.quantized`).
    """
    result: torch.Tensor = _backend(x).quantized_linear(x, weight, out)
    return result


def grouped_quantized_linear(
    x: torch.Tensor, weight: PackedMatrix, ends: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, K] in groups of rows, group e times matrix e of `weight`, a `quantized.stack` of matrices [N, K] -> [M, N].

    ends: int32 [E], where each group's rows end; rows after the last are left as they come. out: as of
    `quantized_linear`. Waits for the device where not `multiplies_groups`.
    """
    result: torch.Tensor = _backend(x).grouped_quantized_linear(x, weight, ends, out)
    return result


def multiplies_groups(weight: PackedMatrix, device: torch.device) -> bool:
    """Whether `grouped_quantized_linear` is one product on this device, and waits for nothing."""
    if device.type != "cuda" or _gpu_backend() is reference:
        return False
    from max_ray.kernels.gpu.quantized import operands_of

    return operands_of(weight) is not None


def quantized_rows(weight: PackedMatrix, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a weight [N, K] by number, int64 [...] -> [..., K]: an embedding whose table is quantized."""
    return reference.quantized_rows(weight, indices, dtype)
