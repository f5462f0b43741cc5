"""Causal attention over the paged cache: which rows go to which kernel, and with what block sizes.

The host never waits for the device: a batch with no more tokens than rows is a decode batch (each row's queries go
through the decode kernel one after the other, one being the rule); in others the decode kernel takes the rows with one
query and the prefill kernel the rest. The choice depends on shapes and `kv.max_kv_length`, on no tensor's content, so
that the calls can be captured in a CUDA graph; capture with the longest `max_kv_length` that the graph is to serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from max_ray.kernels.gpu.attend import score_units
from max_ray.kernels.gpu.decode import decode_kernel, merge_kernel
from max_ray.kernels.gpu.launch import num_processors, on_device_of, padded, unit_stride
from max_ray.kernels.gpu.prefill import prefill_kernel

if TYPE_CHECKING:
    from max_ray.interfaces.model_inputs import KVCacheInputs

_PROGRAMS_A_PROCESSOR = 2  # that a decode step should at least have, so that all of the GPU reads
_LEAST_KEYS_A_SPLIT = 128
_MOST_SPLITS = 32
_LEAST_LINES = 16  # of a matrix product


@dataclass(frozen=True, slots=True)
class _Tile:
    """Block sizes and launch options of one kernel."""

    lines: int
    keys: int
    num_warps: int
    num_stages: int


def decode_tile(group: int, head_dim: int, element_size: int) -> _Tile:
    """16 KiB of keys a round. Five stages are two rounds in flight: one stage more holds the blocks' numbers."""
    keys = max(16, min(128, 2**14 // (padded(head_dim) * element_size)))
    return _Tile(padded(group, _LEAST_LINES), keys, num_warps=4, num_stages=5)


def prefill_tile(group: int, head_dim: int, element_size: int) -> _Tile:
    """The largest tiles that stay in an sm_90's registers; float32, in three products of tf32, needs small ones."""
    width = padded(head_dim)
    if element_size > 2:
        lines, keys, num_warps, num_stages = max(_LEAST_LINES, 2**12 // width), 32 if width <= 128 else 16, 4, 2
    elif width <= 128:
        lines, keys, num_warps, num_stages = 128, 64, 8, 5
    else:
        lines, keys, num_warps, num_stages = 64, 32, 4, 2
    return _Tile(max(min(lines, 128), padded(group)), keys, num_warps, num_stages)


def num_splits(num_rows: int, num_kv_heads: int, longest: int, processors: int) -> int:
    """A power of two: enough programs for the GPU, not so many that a split has too few keys."""
    wanted = -(-_PROGRAMS_A_PROCESSOR * processors // (num_rows * num_kv_heads))
    splits = max(1, min(wanted, longest // _LEAST_KEYS_A_SPLIT, _MOST_SPLITS))
    return 1 << (splits.bit_length() - 1)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv: KVCacheInputs,
    qo_indptr: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    logit_softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    assert sinks is None or logit_softcap is None, "sinks and a soft cap together are not there"
    _check_cache(q, k_cache)
    _check_cache(q, v_cache)
    num_rows = len(kv.cache_lengths)
    assert len(qo_indptr) == num_rows + 1, f"{num_rows} rows, but qo_indptr has {len(qo_indptr)} entries"
    assert q.shape[1] % k_cache.shape[2] == 0, f"{q.shape[1]} query heads on {k_cache.shape[2]} key heads"
    assert kv.block_tables.stride(-1) == 1, "a row's blocks are not contiguous"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q) == 0:
        return out
    units = score_units(scale, logit_softcap)
    call = _Call(unit_stride(q), k_cache, v_cache, kv, qo_indptr, sinks, out, *units, sliding_window or 0)
    is_mixed = len(q) > num_rows
    with on_device_of(q):
        call.decode(only_single=is_mixed)
        if is_mixed:
            call.prefill()
    return out


def _check_cache(q: torch.Tensor, cache: torch.Tensor) -> None:
    assert cache.is_contiguous(), f"a cache has strides {cache.stride()}; kernels need it contiguous"
    assert cache.shape[3] == q.shape[2], f"heads are {q.shape[2]} wide, those of the cache {cache.shape[3]}"
    assert cache.dtype == q.dtype, f"queries are {q.dtype}, the cache {cache.dtype}"


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments of one call. scale, softcap: of `score_units`. window: 0 without one."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    kv: KVCacheInputs
    qo_indptr: torch.Tensor
    sinks: torch.Tensor | None
    out: torch.Tensor
    scale: float
    softcap: float
    window: int

    @property
    def _group(self) -> int:
        return self.q.shape[1] // self.k_cache.shape[2]

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        kv, sinks = self.kv, self.q if self.sinks is None else unit_stride(self.sinks)
        rows = (kv.block_tables, kv.cache_lengths, self.qo_indptr)
        return (self.q, self.k_cache, self.v_cache, *rows, sinks, self.out)

    def _strides(self) -> tuple[int, ...]:
        return (self.q.stride(0), self.q.stride(1), self.kv.block_tables.stride(0), self.k_cache.stride(1))

    def _constants(self, tile: _Tile) -> dict[str, Any]:
        head_dim = self.q.shape[2]
        sizes = {
            "GROUP": self._group,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "HAS_SINKS": self.sinks is not None,
        }
        sizes |= {"PAGE_SIZE": self.kv.page_size, "HEAD_DIM": head_dim}
        blocks = {"BLOCK_M": tile.lines, "BLOCK_N": tile.keys, "BLOCK_D": padded(head_dim, 16)}
        return sizes | blocks | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}

    def decode(self, *, only_single: bool) -> None:
        """Rows with one query, or with `only_single` false every row's queries one by one."""
        num_heads, head_dim = self.q.shape[1:]
        num_rows, num_kv_heads = len(self.kv.cache_lengths), self.k_cache.shape[2]
        longest = min(self.kv.max_kv_length, self.window) if self.window else self.kv.max_kv_length
        splits = num_splits(num_rows, num_kv_heads, longest, num_processors(self.q.device))
        shape = (num_rows, num_heads, splits) if splits > 1 else (1, 1, 1)
        acc = torch.empty((*shape, head_dim), dtype=torch.float32, device=self.q.device)
        largest, total = torch.empty((2, *shape), dtype=torch.float32, device=self.q.device)
        tile = decode_tile(self._group, head_dim, self.q.element_size())
        split = {"ONLY_SINGLE": only_single, "NUM_SPLITS": splits}
        rest = (*self._strides(), num_heads, self.scale)
        decode_kernel[(num_rows, num_kv_heads, splits)](
            *self._tensors(), acc, largest, total, *rest, **split, **self._constants(tile)
        )
        if splits > 1:
            partial = (acc, largest, total, self.qo_indptr, self.out, num_heads)
            merge_kernel[(num_rows, num_heads)](*partial, **split, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim, 16))

    def prefill(self) -> None:
        """Rows with more than one query."""
        num_tokens, num_heads, head_dim = self.q.shape
        num_rows = len(self.kv.cache_lengths)
        tile = prefill_tile(self._group, head_dim, self.q.element_size())
        block_q = tile.lines // self._group
        grid = (num_tokens // block_q + num_rows, self.k_cache.shape[2])
        rest = (*self._strides(), num_heads, num_rows, self.scale)
        prefill_kernel[grid](*self._tensors(), *rest, SKIP_SINGLE=True, BLOCK_Q=block_q, **self._constants(tile))
