"""Attention over latents against a loop over queries: decode rows and prompts in one batch, and prompts in pieces."""

from __future__ import annotations

import pytest
import torch

from max_ray import kernels
from max_ray.interfaces import KVCacheInputs
from max_ray.kernels.cpu import latent as implementation

PAGE, HEADS, LATENT, ROPE, SCALE = 4, 3, 6, 2, 0.4


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
    return torch.randn(sum(new), HEADS, LATENT + ROPE), latents, kv, indptr


def naive(q: torch.Tensor, latents: torch.Tensor, cached: list[int], new: list[int]) -> torch.Tensor:
    """One query and head at a time."""
    out = []
    queries = iter(q)
    for row, (first, count) in enumerate(zip(cached, new, strict=True)):
        for i in range(count):
            seen = latents[row, : first + i + 1]
            heads = next(queries)
            out.append(torch.stack([(seen @ head * SCALE).softmax(0) @ seen[:, :LATENT] for head in heads]))
    return torch.stack(out)


@pytest.mark.parametrize("max_scores", [1, 100, 2**22])
@pytest.mark.parametrize(
    ("cached", "new"), [([0], [1]), ([0, 3, 4, 9], [5, 1, 1, 4]), ([7, 2, 30], [1, 1, 1]), ([0, 8], [13, 0])]
)
def test_latent_attention_equals_a_loop(
    monkeypatch: pytest.MonkeyPatch, cached: list[int], new: list[int], max_scores: int
) -> None:
    monkeypatch.setattr(implementation, "_MAX_SCORES", max_scores)
    q, latents, kv, indptr = ragged_batch(cached, new)
    got = kernels.latent_attention(q, kv.keys[0], kv, indptr, scale=SCALE, latent_dim=LATENT)
    torch.testing.assert_close(got, naive(q, latents, cached, new), atol=1e-5, rtol=0)


def test_a_second_layer_uses_the_first_ones_plan() -> None:
    q, _, kv, indptr = ragged_batch([3], [2])
    first = kernels.latent_attention(q, kv.keys[0], kv, indptr, scale=SCALE, latent_dim=LATENT)
    (plan,) = kv.plans.values()
    again = kernels.latent_attention(q, kv.keys[0], kv, indptr, scale=SCALE, latent_dim=LATENT)
    assert next(iter(kv.plans.values())) is plan
    torch.testing.assert_close(first, again)
