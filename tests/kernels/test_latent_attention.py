"""Attention over latents against a loop over queries: decode rows and prompts in one batch, and prompts in pieces."""

from __future__ import annotations

import pytest
import torch

from max_ray import kernels
from max_ray.interfaces import KVCacheInputs
from max_ray.kernels.reference import latent as implementation

PAGE, HEADS, LATENT, ROPE, PLAIN, VALUE, SCALE = 4, 3, 6, 2, 5, 4, 0.4


def ragged_batch(cached: list[int], new: list[int]) -> tuple[torch.Tensor, torch.Tensor, KVCacheInputs, torch.Tensor]:
    """(q, latents of every row [B, S, C], the cache inputs with all latents written, qo_indptr)."""
    torch.manual_seed(0)
    lengths = [c + n for c, n in zip(cached, new, strict=True)]
    num_pages = [-(-length // PAGE) for length in lengths]
    blocks = torch.randperm(sum(num_pages)).split(num_pages)
    tables = torch.zeros(len(new), max(num_pages), dtype=torch.int32)
    cache = torch.full((sum(num_pages), PAGE, 1, LATENT + ROPE), torch.nan)
    latents = torch.randn(len(new), max(lengths), LATENT + ROPE)
    for row, length in enumerate(lengths):
        tables[row, : num_pages[row]] = blocks[row]
        positions = torch.arange(length)
        slots = blocks[row][positions // PAGE] * PAGE + positions % PAGE
        kernels.append_latent(latents[row, :length], cache, slots)
    kv = KVCacheInputs(
        keys=[cache],
        values=[cache[..., :0]],
        block_tables=tables,
        cache_lengths=torch.tensor(cached, dtype=torch.int32),
        slot_mapping=torch.empty(0, dtype=torch.int64),
        max_kv_length=max(lengths),
        page_size=PAGE,
    )
    indptr = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
    return torch.randn(sum(new), HEADS, PLAIN + ROPE), latents, kv, indptr


def up_weight() -> torch.Tensor:
    return torch.randn(HEADS, PLAIN + VALUE, LATENT, generator=torch.Generator().manual_seed(1))


def naive(q: torch.Tensor, latents: torch.Tensor, cached: list[int], new: list[int]) -> torch.Tensor:
    """One query and head at a time, its keys and values made by the definition."""
    out = []
    queries = iter(q)
    for row, (first, count) in enumerate(zip(cached, new, strict=True)):
        for i in range(count):
            seen = latents[row, : first + i + 1]
            out.append(
                torch.stack([one_head(query, up, seen) for query, up in zip(next(queries), up_weight(), strict=True)])
            )
    return torch.stack(out)


def one_head(query: torch.Tensor, up: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    keys = torch.cat((seen[:, :LATENT] @ up[:PLAIN].T, seen[:, LATENT:]), dim=1)
    values = seen[:, :LATENT] @ up[PLAIN:].T
    return (keys @ query * SCALE).softmax(0) @ values


@pytest.mark.parametrize("max_numbers", [1, 100, 2**22])
@pytest.mark.parametrize("is_expanded", [False, True])
@pytest.mark.parametrize(
    ("cached", "new"), [([0], [1]), ([0, 3, 4, 9], [5, 1, 1, 4]), ([7, 2, 30], [1, 1, 1]), ([0, 8], [13, 0])]
)
def test_latent_attention_equals_a_loop(
    monkeypatch: pytest.MonkeyPatch, cached: list[int], new: list[int], is_expanded: bool, max_numbers: int
) -> None:
    monkeypatch.setattr(implementation, "_MAX_NUMBERS", max_numbers)
    monkeypatch.setattr(implementation, "_is_expanded", lambda *_: is_expanded)
    q, latents, kv, indptr = ragged_batch(cached, new)
    got = kernels.latent_attention(q, kv.keys[0], kv, indptr, up=up_weight(), scale=SCALE)
    torch.testing.assert_close(got, naive(q, latents, cached, new), atol=1e-5, rtol=0)


def test_long_prompts_are_expanded_and_decode_rows_are_not() -> None:
    """DeepSeek-V3's sizes: 170 queries and more behind a long context."""
    heads = implementation._Heads(torch.empty(1, 128 + 128, 512, device="meta"), 128, 1.0)
    expanded = [implementation._is_expanded(n, 100_000, heads) for n in (1, 16, 160, 180, 2048)]
    assert expanded == [False, False, False, True, True]
    assert implementation._is_expanded(64, 64, heads)


def test_a_second_layer_uses_the_first_ones_plan() -> None:
    q, _, kv, indptr = ragged_batch([3], [2])
    first = kernels.latent_attention(q, kv.keys[0], kv, indptr, up=up_weight(), scale=SCALE)
    (plan,) = kv.plans.values()
    again = kernels.latent_attention(q, kv.keys[0], kv, indptr, up=up_weight(), scale=SCALE)
    assert next(iter(kv.plans.values())) is plan
    torch.testing.assert_close(first, again)
