"""Attention with sinks against its definition: decode rows and prompts in one batch, windows, slices of queries."""

from __future__ import annotations

import pytest
import torch

from max_ray import kernels
from max_ray.kernels.reference import sinks as implementation
from tests.kernels import naive
from tests.kernels.attention_batches import SCALE, make_batch

ROWS = [(0, 5), (3, 1), (9, 1), (6, 4), (0, 1), (20, 1), (2, 11)]


@pytest.mark.parametrize("max_scores", [1, 50, 2**22])
@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_sinks(monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], window: int | None, max_scores: int) -> None:
    monkeypatch.setattr(implementation, "_SCORES", max_scores)
    batch = make_batch(ROWS, heads=heads)
    sinks = torch.randn(heads[0])
    args = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
    got = kernels.paged_attention(*args, scale=SCALE, sliding_window=window, sinks=sinks)
    expected = naive.attention(*args, SCALE, window, sinks=sinks)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def test_a_sink_far_below_the_scores_changes_nothing() -> None:
    batch = make_batch(ROWS)
    args = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
    got = kernels.paged_attention(*args, scale=SCALE, sinks=torch.full((4,), -1e4))
    batch.kv.plans.clear()
    torch.testing.assert_close(got, kernels.paged_attention(*args, scale=SCALE), atol=1e-5, rtol=0)


def test_a_sink_far_above_the_scores_leaves_nothing() -> None:
    batch = make_batch(ROWS)
    args = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
    assert kernels.paged_attention(*args, scale=SCALE, sinks=torch.full((4,), 1e4)).abs().max() == 0
