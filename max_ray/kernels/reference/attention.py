"""Causal attention over a paged cache, on any torch device.

Axes: T tokens, B rows, N queries of a row, S keys, H query heads, KVH key heads, G = H / KVH, D head_dim.

Rows with one query (decode) are computed in groups: the keys of a group are gathered into one padded [B, S] tensor,
and the G query heads of a key head take the place of queries, so that keys are read once. Rows with more queries go
one by one.

What was measured (float32 and bfloat16, AVX-512): grouped heads against `enable_gqa` are up to 15 times faster at one
query in bfloat16 and equal at many; one call for 32 rows of 128 keys is up to 6 times faster than 32 calls; but gathers
of many MiB lose to small ones whose memory is used again, hence the limit on a group's bytes.

A row never reads memory past its own tokens: its padding repeats its own last slot. So a NaN that another request left
in a block cannot reach this row through 0 * NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from max_ray.kernels.reference.sinks import attention_with_sinks
from max_ray.kernels.reference.softcap import softcapped_attention

if TYPE_CHECKING:
    from max_ray.interfaces.model_inputs import KVCacheInputs

_GROUP_BYTES = 2 * 2**20  # of gathered keys; about 2 to 4 MiB was best, 16 MiB and more up to 3 times slower
_FREE_PADDING = 64  # keys of padding that cost less than one more call


@dataclass(frozen=True, slots=True)
class _Row:
    """Queries [start, stop) of the batch attend to keys [kv_start, kv_stop) of row `index`'s sequence.

    kv_start is a multiple of the page size; `num_hidden` keys after it lie outside the first query's sliding window.
    """

    index: int
    start: int
    stop: int
    kv_start: int
    kv_stop: int
    num_hidden: int

    @property
    def num_queries(self) -> int:
        return self.stop - self.start

    @property
    def kv_len(self) -> int:
        return self.kv_stop - self.kv_start


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of scaled_dot_product_attention: rows that go together, and which keys they read.

    queries: int64 [B], the rows' query tokens, for a group of decode rows; None for a single row with more queries.
    slots: int64 [B, S]. mask: bool, broadcastable to the scores; None where every query sees every key, or is_causal.
    """

    row: _Row
    queries: torch.Tensor | None
    slots: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool = False


@dataclass(frozen=True, slots=True)
class _Scores:
    """What happens to q k^T before the softmax, and what is beside it there (sinks [H], see kernels)."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """q [B, H, N, D], k and v [B, KVH, S, D] (KVH = H unless `enable_gqa`) -> [B, H, N, D]."""
        if self.sinks is not None:
            sinks = self.sinks.view(-1, 1) if enable_gqa else self.sinks.view(q.shape[1:3])
            return attention_with_sinks(q, k, v, mask, is_causal, self.scale, sinks)
        if self.softcap is not None:
            return softcapped_attention(q, k, v, mask, is_causal, self.scale, self.softcap)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale, enable_gqa=enable_gqa
        )


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
    key_bytes = k_cache.shape[2] * k_cache.shape[3] * k_cache.element_size()
    calls = kv.plans.get((sliding_window, key_bytes))
    if calls is None:  # the first layer of a step plans for all
        calls = kv.plans[sliding_window, key_bytes] = _plan(kv, qo_indptr, sliding_window, _GROUP_BYTES // key_bytes)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for call in calls:
        run = _prefill if call.queries is None else _decode
        run(out, q, k_cache, v_cache, call, _Scores(scale, logit_softcap, sinks))
    return out


def _plan(kv: KVCacheInputs, qo_indptr: torch.Tensor, sliding_window: int | None, max_keys: int) -> list[_Call]:
    rows = _rows(kv, qo_indptr, sliding_window)
    calls = []
    for group in _decode_groups([row for row in rows if row.num_queries == 1], max_keys):
        slots, mask = _slots(kv, group)
        queries = torch.tensor([row.start for row in group], device=slots.device)
        calls.append(_Call(group[0], queries, slots, None if mask is None else mask[:, None, None]))
    for row in rows:
        if row.num_queries > 1:
            slots, _ = _slots(kv, [row])
            is_square = row.num_queries == row.kv_len and (sliding_window is None or sliding_window >= row.kv_len)
            mask = None if is_square else _causal_mask(row, sliding_window, slots.device)
            calls.append(_Call(row, None, slots, mask, is_square))
    return calls


def _rows(kv: KVCacheInputs, qo_indptr: torch.Tensor, sliding_window: int | None) -> list[_Row]:
    indptr, cache_lengths = qo_indptr.tolist(), kv.cache_lengths.tolist()
    assert len(indptr) == len(cache_lengths) + 1, f"{len(cache_lengths)} rows, but qo_indptr has {len(indptr)} entries"
    rows = []
    for index, cache_length in enumerate(cache_lengths):
        start, stop = indptr[index], indptr[index + 1]
        first_key = 0 if sliding_window is None else max(0, cache_length + 1 - sliding_window)
        num_hidden = first_key % kv.page_size
        rows.append(_Row(index, start, stop, first_key - num_hidden, cache_length + stop - start, num_hidden))
    return rows


def _decode_groups(rows: list[_Row], max_keys: int) -> Iterator[list[_Row]]:
    """Rows of similar length together, at most `max_keys` keys a group with padding (a single row may be longer)."""
    group: list[_Row] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -row.kv_len):
        padding = longest - row.kv_len
        if group and ((len(group) + 1) * longest > max_keys or padding > max(_FREE_PADDING, longest // 2)):
            yield group
            group = []
        if not group:
            longest = row.kv_len
        group.append(row)
    if group:
        yield group


def _decode(
    out: torch.Tensor, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, call: _Call, scores: _Scores
) -> None:
    """One query a row: q [B, KVH, G, D] against keys [B, KVH, S, D]."""
    assert call.queries is not None
    k, v = _gather(k_cache, call.slots), _gather(v_cache, call.slots)
    grouped_q = q.index_select(0, call.queries).view(len(call.queries), k_cache.shape[2], -1, q.shape[2])
    attended = scores.attend(grouped_q, k, v, call.mask)
    out.index_copy_(0, call.queries, attended.flatten(1, 2))


def _prefill(
    out: torch.Tensor, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, call: _Call, scores: _Scores
) -> None:
    """Several queries of one row: q [1, H, N, D] against keys [1, KVH, S, D]."""
    attended = scores.attend(
        q[call.row.start : call.row.stop].transpose(0, 1)[None],
        _gather(k_cache, call.slots),
        _gather(v_cache, call.slots),
        call.mask,
        is_causal=call.is_causal,
        enable_gqa=True,
    )
    out[call.row.start : call.row.stop] = attended[0].transpose(0, 1)


def _slots(kv: KVCacheInputs, rows: list[_Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(slots [B, S] of the rows' keys, mask [B, S] of the keys that their first query sees; None where it sees all).

    A key's mask is False past its row's end and outside the sliding window.
    """
    page_size, device = kv.page_size, kv.block_tables.device
    longest = max(row.kv_len for row in rows)
    offsets = torch.arange(longest, device=device)
    fields = [(row.index, row.kv_start // page_size, row.kv_len, row.num_hidden) for row in rows]
    index, first_block, length, num_hidden = torch.tensor(fields, device=device).T.unsqueeze(2)  # [B, 1] each
    table = kv.block_tables.index_select(0, index.flatten())
    blocks = table.gather(1, (first_block + offsets // page_size).clamp_(max=table.shape[1] - 1))
    slots = blocks * page_size + offsets % page_size
    if any(row.kv_len != longest for row in rows):
        slots = torch.where(offsets < length, slots, slots.gather(1, length - 1))
    elif not any(row.num_hidden for row in rows):
        return slots, None
    return slots, (offsets < length) & (offsets >= num_hidden)


def _gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Keys or values of slots [B, S] as [B, KVH, S, D], a view whose memory is [B, S, KVH, D]."""
    tokens = cache.view(-1, *cache.shape[2:]).index_select(0, slots.flatten())
    return tokens.view(*slots.shape, *cache.shape[2:]).transpose(1, 2)


def _causal_mask(row: _Row, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """bool [N, S]: which keys each query sees."""
    queries = torch.arange(row.kv_stop - row.num_queries, row.kv_stop, device=device)[:, None]
    keys = torch.arange(row.kv_start, row.kv_stop, device=device)[None]
    mask = keys <= queries
    return mask if sliding_window is None else mask & (keys > queries - sliding_window)
