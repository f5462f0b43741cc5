"""Attention over a paged cache of latents that all heads share, in two ways that are put together.

Absorbed, for the one query of a decode row, and for what a prompt's chunk sees of the cache before it: W_uk goes into
the queries and W_uv into the result, by products of a matrix a head, and the kernels between see one key head of L + R
numbers. Expanded, for what the new tokens of a prompt or chunk see of one another: keys and values of every head are
made from the step's latents, which takes less than a third of the multiplications a pair (DeepSeek-V3's sizes).

As in `attention`, the host never waits for the device, and the choice of launches depends on shapes and
`kv.max_kv_length` alone. What a step may have in the cache is therefore computed in every step with prompts, also where
the device finds nothing there, unless the rows' lengths cannot be what they are but for whole prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from max_ray.kernels.gpu.attend import score_units
from max_ray.kernels.gpu.decode import merge_kernel
from max_ray.kernels.gpu.latent_expanded import expanded_kernel
from max_ray.kernels.gpu.latent_kernels import latent_decode_kernel, latent_prefix_kernel
from max_ray.kernels.gpu.launch import num_processors, on_device_of, padded, unit_stride, warps_for
from max_ray.kernels.gpu.paged_cache import append_latent_kernel, check_cache

if TYPE_CHECKING:
    from max_ray.interfaces.model_inputs import KVCacheInputs

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


def prefix_tile(num_heads: int, latent_dim: int, element_size: int, widest: int) -> Tile:
    """As many queries as fill the lines."""
    lines = most_lines(latent_dim, element_size, widest)
    return Tile(heads_a_program(num_heads, lines), lines, keys=lines, num_warps=8, num_stages=3)


def expanded_tile(plain_dim: int, value_dim: int, element_size: int, widest: int) -> Tile:
    """As of the prefill kernel: the largest tiles of one head's queries that stay in the registers."""
    width = max(padded(plain_dim), padded(value_dim))
    if element_size > 2:
        return Tile(1, max(_LEAST_LINES, min(64, 2**11 // width)), keys=16, num_warps=4, num_stages=2)
    if width <= 128 and widest == 64:
        return Tile(1, lines=128, keys=64, num_warps=8, num_stages=3)
    return Tile(1, lines=64, keys=32, num_warps=4 if width <= 128 else 8, num_stages=2)


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
    call = _Call(unit_stride(q), cache, kv, qo_indptr, up, plain_dim, score_units(scale, None)[0])
    with on_device_of(q):
        if num_tokens <= num_rows:
            return call.absorbed(only_single=False)[0]
        if num_tokens == num_rows * kv.max_kv_length:  # all are as long as the longest, and all of their tokens are new
            return call.expanded(q.new_empty(num_tokens, num_heads, up.shape[1] - plain_dim), None)
        return call.expanded(*call.absorbed(only_single=True))


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
    """Arguments of one call. q: [T, H, P + R]. up: [H, P + V, L]. plain_dim: P. scale: of `score_units`."""

    q: torch.Tensor
    cache: torch.Tensor
    kv: KVCacheInputs
    qo_indptr: torch.Tensor
    up: torch.Tensor
    plain_dim: int
    scale: float

    @property
    def _rope_dim(self) -> int:
        return self.q.shape[2] - self.plain_dim

    @property
    def _tile_sizes(self) -> tuple[int, int, int, int]:
        """What decode_tile and prefix_tile ask for."""
        return (*self.up.shape[::2], self.q.element_size(), widest_lines(self.q.device))

    def absorbed(self, *, only_single: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(result [T, H, V], None) of all tokens. With `only_single`: of rows with one query, and in the tokens of the
        others what they see of the cache before this step, to go on from with its scores float32 [T, H]."""
        (num_tokens, num_heads, _), latent_dim = self.q.shape, self.up.shape[2]
        q_latent = torch.bmm(self.q[..., : self.plain_dim].transpose(0, 1), self.up[:, : self.plain_dim])  # [H, T, L]
        out = self.q.new_empty(num_tokens, num_heads, latent_dim)
        largest = None
        self._decode(q_latent.transpose(0, 1), out, only_single)
        if only_single:
            largest = self._prefix(q_latent.transpose(0, 1), out)
        return torch.bmm(out.transpose(0, 1), self.up[:, self.plain_dim :].mT).transpose(0, 1), largest

    def expanded(self, out: torch.Tensor, prefix_largest: torch.Tensor | None) -> torch.Tensor:
        """out [T, H, V] with the result of rows with more than one query; of the others it stays as it is.
        prefix_largest: of `absorbed`, whose result `out` is then; None: there is nothing before this step."""
        num_tokens, num_heads, _ = self.q.shape
        num_rows, value_dim, latent_dim = len(self.kv.cache_lengths), out.shape[2], self.up.shape[2]
        assert len(self.kv.slot_mapping) == num_tokens, f"{num_tokens} tokens, {len(self.kv.slot_mapping)} slots"
        latents = self.cache.view(-1, self.cache.shape[3]).index_select(0, self.kv.slot_mapping)  # of this step
        made = F.linear(latents[:, :latent_dim], self.up.flatten(0, 1))
        tile = expanded_tile(self.plain_dim, value_dim, self.q.element_size(), widest_lines(self.q.device))
        largest = self.qo_indptr if prefix_largest is None else prefix_largest
        sizes = {"PLAIN_DIM": self.plain_dim, "ROPE_DIM": self._rope_dim, "VALUE_DIM": value_dim}
        blocks = {"BLOCK_P": padded(self.plain_dim, 16), "BLOCK_R": padded(self._rope_dim, 16)}
        expanded_kernel[(num_tokens // tile.lines + num_rows, num_heads)](
            *(self.q, made, latents[:, latent_dim:], largest, self.qo_indptr, out),
            *(*self.q.stride()[:2], made.stride(0), latents.stride(0), *out.stride()[:2]),
            *(num_heads, num_rows, self.scale),
            HAS_PREFIX=prefix_largest is not None,
            **(sizes | blocks | {"BLOCK_V": padded(value_dim, 16), "BLOCK_M": tile.lines, "BLOCK_N": tile.keys}),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return out

    def _tensors(self, q_latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kv, q_rope = self.kv, self.q[..., self.plain_dim :]
        return (q_latent, q_rope, self.cache, kv.block_tables, kv.cache_lengths, self.qo_indptr)

    def _strides(self, q_latent: torch.Tensor) -> tuple[int, ...]:
        return (*q_latent.stride()[:2], *self.q.stride()[:2], self.kv.block_tables.stride(0))

    def _constants(self, tile: Tile) -> dict[str, Any]:
        latent_dim, rope_dim = self.up.shape[2], self._rope_dim
        sizes = {"HEADS": tile.heads, "PAGE_SIZE": self.kv.page_size, "LATENT_DIM": latent_dim, "ROPE_DIM": rope_dim}
        blocks = {"BLOCK_M": tile.lines, "BLOCK_N": tile.keys, "BLOCK_R": padded(rope_dim, 16)}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        return sizes | blocks | {"BLOCK_H": padded(latent_dim, 32) // 2} | options

    def _decode(self, q_latent: torch.Tensor, out: torch.Tensor, only_single: bool) -> None:
        """out [T, H, L] of rows with one query, or with `only_single` false of all tokens."""
        num_tokens, num_heads, latent_dim = out.shape
        num_rows = len(self.kv.cache_lengths)
        programs = num_rows if only_single else num_tokens
        tile = decode_tile(*self._tile_sizes)
        splits = num_splits(programs, num_heads, tile.heads, self.kv.max_kv_length, num_processors(out.device))
        shape = (programs, num_heads, splits) if splits > 1 else (1, 1, 1)
        acc = torch.empty((*shape, latent_dim), dtype=torch.float32, device=out.device)
        largest, total = torch.empty((2, *shape), dtype=torch.float32, device=out.device)
        rows = self.qo_indptr if only_single else _row_of_token(self.kv, self.qo_indptr, num_tokens)
        split = {"ONLY_SINGLE": only_single, "NUM_SPLITS": splits}
        latent_decode_kernel[(programs, -(-num_heads // tile.heads), splits)](
            *(*self._tensors(q_latent), rows, out, acc, largest, total),
            *(*self._strides(q_latent), num_heads, self.scale),
            **split,
            **self._constants(tile),
        )
        if splits > 1:
            partial = (acc, largest, total, self.qo_indptr, out, num_heads)
            columns = min(_MERGED_COLUMNS, padded(latent_dim, 16))
            grid = (num_rows, num_heads, -(-latent_dim // columns))
            merge_kernel[grid](*partial, **split, HEAD_DIM=latent_dim, BLOCK_D=columns)

    def _prefix(self, q_latent: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out [T, H, L] of rows with more than one query, and the scores [T, H]: see latent_prefix_kernel."""
        num_tokens, num_heads, _ = out.shape
        num_rows = len(self.kv.cache_lengths)
        largest = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=out.device)
        tile = prefix_tile(*self._tile_sizes)
        block_q = tile.lines // tile.heads
        grid = (num_tokens // block_q + num_rows, -(-num_heads // tile.heads))
        rest = (out, largest, *self._strides(q_latent), num_heads, num_rows, self.scale)
        latent_prefix_kernel[grid](*self._tensors(q_latent), *rest, BLOCK_Q=block_q, **self._constants(tile))
        return largest
