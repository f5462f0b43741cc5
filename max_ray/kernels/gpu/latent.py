"""Attention over a paged cache of latents that all heads share, absorbed: W_uk goes into the queries and W_uv into the
result, by products of a matrix a head, and the kernels between see one key head of L + R numbers.

As in `attention`, the host never waits for the device, and the choice of launches depends on shapes and
`kv.max_kv_length` alone. All rows are absorbed, prompts too, although that is about 3.4 times the multiplications of
keys and values made for every head (DeepSeek-V3's sizes): how many keys a row has is the device's knowledge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from max_ray.kernels.gpu.attend import score_units
from max_ray.kernels.gpu.attention import num_processors
from max_ray.kernels.gpu.decode import merge_kernel
from max_ray.kernels.gpu.latent_kernels import latent_decode_kernel, latent_prefill_kernel
from max_ray.kernels.gpu.launch import on_device_of, padded, unit_stride, warps_for
from max_ray.kernels.gpu.paged_cache import append_latent_kernel, check_cache

if TYPE_CHECKING:
    from max_ray.interfaces.model import KVCacheInputs

_PROGRAMS_A_PROCESSOR = 2
_LEAST_KEYS_A_SPLIT = 128
_KEYS_A_HEAD = 4  # that a split should have: below, writing its results costs more than reading its keys
_MOST_SPLITS = 128  # there is one key head only, so that few rows need many
_LEAST_LINES = 16  # of a matrix product
_MERGED_COLUMNS = 128  # of a program that merges
_WIDE_BYTES = 218 * 1024  # of a processor's shared memory, for 64 lines of DeepSeek's 512 + 64 numbers


@dataclass(frozen=True, slots=True)
class Tile:
    """Block sizes and launch options of one kernel. heads: of one program."""

    heads: int
    lines: int
    keys: int
    num_warps: int
    num_stages: int


@cache
def widest_lines(device: torch.device) -> int:
    """Of a program on this device: 64 where its shared memory holds two rounds of keys beside that many queries."""
    if device.type != "cuda":
        return 64  # the interpreter
    return 64 if torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= _WIDE_BYTES else 32


def most_lines(latent_dim: int, element_size: int, widest: int) -> int:
    """Lines whose results [lines, L] stay in the registers. (In float32 they do not: three products of tf32 keep six
    tiles, some of them in local memory.)"""
    return widest if element_size <= 2 and latent_dim <= 512 else _LEAST_LINES


def heads_a_program(num_heads: int, lines: int) -> int:
    """As many in every program as in the others, about."""
    return -(-num_heads // -(-num_heads // lines))


def decode_tile(num_heads: int, latent_dim: int, element_size: int, widest: int) -> Tile:
    """Rounds of 64 keys for 64 lines, which an sm_90's tensor cores read from shared memory; otherwise of 32, so that
    two programs share a processor. The stages are two rounds in flight but for the last, smaller kind of GPU."""
    limit = most_lines(latent_dim, element_size, widest)
    heads = heads_a_program(num_heads, limit)
    lines = padded(heads, _LEAST_LINES)
    if limit == _LEAST_LINES:
        return Tile(heads, lines, keys=16, num_warps=8, num_stages=3)
    if lines == 64:
        return Tile(heads, lines, keys=64, num_warps=8, num_stages=3)
    if lines == _LEAST_LINES:
        return Tile(heads, lines, keys=32, num_warps=4, num_stages=5)
    return Tile(heads, lines, keys=32, num_warps=8, num_stages=5 if widest == 64 else 3)


def prefill_tile(num_heads: int, latent_dim: int, element_size: int, widest: int) -> Tile:
    """As many queries as fill the lines."""
    lines = most_lines(latent_dim, element_size, widest)
    return Tile(heads_a_program(num_heads, lines), lines, keys=lines, num_warps=8, num_stages=3)


def num_splits(num_tokens: int, num_heads: int, heads: int, longest: int, processors: int) -> int:
    """A power of two: enough programs, of so many `heads` each, for the GPU; few enough that a split has keys."""
    programs = num_tokens * -(-num_heads // heads)
    wanted = -(-_PROGRAMS_A_PROCESSOR * processors // programs)
    least_keys = max(_LEAST_KEYS_A_SPLIT, _KEYS_A_HEAD * heads)
    splits = max(1, min(wanted, longest // least_keys, _MOST_SPLITS))
    return 1 << (splits.bit_length() - 1)


def append_latent(latent: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    check_cache(latent.unsqueeze(1), cache)
    num_tokens, width = latent.shape
    if num_tokens == 0:
        return
    latent, block = unit_stride(latent), padded(width)
    with on_device_of(latent):
        append_latent_kernel[(num_tokens,)](
            latent, cache, slot_mapping, latent.stride(0), width, BLOCK=block, num_warps=warps_for(block)
        )


def latent_attention(
    q: torch.Tensor, cache: torch.Tensor, kv: KVCacheInputs, qo_indptr: torch.Tensor, *, up: torch.Tensor, scale: float
) -> torch.Tensor:
    num_tokens, num_heads, width = q.shape
    num_rows, latent_dim = len(kv.cache_lengths), up.shape[2]
    rope_dim = cache.shape[3] - latent_dim
    plain_dim = width - rope_dim
    assert cache.is_contiguous(), f"a cache has strides {cache.stride()}; kernels need it contiguous"
    assert cache.dtype == q.dtype == up.dtype, f"queries are {q.dtype}, the cache {cache.dtype}, weights {up.dtype}"
    assert up.shape[0] == num_heads, f"{num_heads} query heads, but weights of {up.shape[0]}"
    assert len(qo_indptr) == num_rows + 1, f"{num_rows} rows, but qo_indptr has {len(qo_indptr)} entries"
    assert kv.block_tables.stride(-1) == 1, "a row's blocks are not contiguous"
    if num_tokens == 0:
        return q.new_empty(0, num_heads, up.shape[1] - plain_dim)
    q = unit_stride(q)
    q_latent = torch.bmm(q[..., :plain_dim].transpose(0, 1), up[:, :plain_dim])  # [H, T, L]
    attended = torch.empty(num_tokens, num_heads, latent_dim, dtype=q.dtype, device=q.device)
    units, _ = score_units(scale, None)
    call = _Call(q_latent.transpose(0, 1), q[..., plain_dim:], cache, kv, qo_indptr, attended, units)
    is_mixed = num_tokens > num_rows
    with on_device_of(q):
        call.decode(only_single=is_mixed)
        if is_mixed:
            call.prefill()
    return torch.bmm(attended.transpose(0, 1), up[:, plain_dim:].mT).transpose(0, 1)


def _row_of_token(kv: KVCacheInputs, qo_indptr: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """int32 [T], made once a step."""
    rows = kv.plans.get("row of token")
    if rows is None:
        tokens = torch.arange(num_tokens, dtype=qo_indptr.dtype, device=qo_indptr.device)
        rows = torch.searchsorted(qo_indptr[1:], tokens, right=True, out_int32=True)
        kv.plans["row of token"] = rows
    return rows


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments of one call. q_latent [T, H, L], q_rope [T, H, R]; out: [T, H, L]. scale: of `score_units`."""

    q_latent: torch.Tensor
    q_rope: torch.Tensor
    cache: torch.Tensor
    kv: KVCacheInputs
    qo_indptr: torch.Tensor
    out: torch.Tensor
    scale: float

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        kv = self.kv
        return (self.q_latent, self.q_rope, self.cache, kv.block_tables, kv.cache_lengths, self.qo_indptr)

    def _strides(self) -> tuple[int, ...]:
        return (*self.q_latent.stride()[:2], *self.q_rope.stride()[:2], self.kv.block_tables.stride(0))

    def _constants(self, tile: Tile) -> dict[str, Any]:
        latent_dim, rope_dim = self.q_latent.shape[2], self.q_rope.shape[2]
        sizes = {"HEADS": tile.heads, "PAGE_SIZE": self.kv.page_size, "LATENT_DIM": latent_dim, "ROPE_DIM": rope_dim}
        blocks = {"BLOCK_M": tile.lines, "BLOCK_N": tile.keys, "BLOCK_R": padded(rope_dim, 16)}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        return sizes | blocks | {"BLOCK_H": padded(latent_dim, 32) // 2} | options

    def _head_blocks(self, tile: Tile) -> int:
        return -(-self.out.shape[1] // tile.heads)

    def decode(self, *, only_single: bool) -> None:
        """Rows with one query, or with `only_single` false all tokens."""
        num_tokens, num_heads, latent_dim = self.out.shape
        num_rows = len(self.kv.cache_lengths)
        programs = num_rows if only_single else num_tokens
        tile = decode_tile(num_heads, latent_dim, self.out.element_size(), widest_lines(self.out.device))
        processors = num_processors(self.out.device)
        splits = num_splits(programs, num_heads, tile.heads, self.kv.max_kv_length, processors)
        shape = (programs, num_heads, splits) if splits > 1 else (1, 1, 1)
        acc = torch.empty((*shape, latent_dim), dtype=torch.float32, device=self.out.device)
        largest, total = torch.empty((2, *shape), dtype=torch.float32, device=self.out.device)
        rows = self.qo_indptr if only_single else _row_of_token(self.kv, self.qo_indptr, num_tokens)
        split = {"ONLY_SINGLE": only_single, "NUM_SPLITS": splits}
        latent_decode_kernel[(programs, self._head_blocks(tile), splits)](
            *(*self._tensors(), rows, self.out, acc, largest, total),
            *(*self._strides(), num_heads, self.scale),
            **split,
            **self._constants(tile),
        )
        if splits > 1:
            partial = (acc, largest, total, self.qo_indptr, self.out, num_heads)
            columns = min(_MERGED_COLUMNS, padded(latent_dim, 16))
            grid = (num_rows, num_heads, -(-latent_dim // columns))
            merge_kernel[grid](*partial, **split, HEAD_DIM=latent_dim, BLOCK_D=columns)

    def prefill(self) -> None:
        """Rows with more than one query."""
        num_tokens, num_heads, latent_dim = self.out.shape
        num_rows = len(self.kv.cache_lengths)
        tile = prefill_tile(num_heads, latent_dim, self.out.element_size(), widest_lines(self.out.device))
        block_q = tile.lines // tile.heads
        grid = (num_tokens // block_q + num_rows, self._head_blocks(tile))
        rest = (self.out, *self._strides(), num_heads, num_rows, self.scale)
        latent_prefill_kernel[grid](*self._tensors(), *rest, BLOCK_Q=block_q, **self._constants(tile))
