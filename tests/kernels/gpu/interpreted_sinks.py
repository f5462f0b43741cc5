"""Triton paged attention with sinks against the reference: prefill, decode and mixed batches, windows, splits.

TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu/interpreted_sinks.py
"""

from __future__ import annotations

import pytest
import torch

from max_ray.kernels import gpu, reference
from max_ray.kernels.gpu import attention
from tests.kernels.attention_batches import SCALE, Batch, make_batch
from tests.kernels.gpu.interpreted_attention import MIXED, TOLERANCE

FAR = 1e4  # from the scores: exp2 of such a difference is 0


def check(batch: Batch, sinks: torch.Tensor, window: int | None = None) -> torch.Tensor:
    arguments = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
    batch.kv.plans.clear()
    scores = {"scale": SCALE, "sliding_window": window, "logit_softcap": None, "sinks": sinks}
    expected = reference.paged_attention(*arguments, **scores)
    actual = gpu.paged_attention(*arguments, **scores)
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    return actual


@pytest.mark.parametrize("window", [None, 1, 17])
@pytest.mark.parametrize("page_size", [1, 16])
def test_sinks_in_decode_at_page_borders(page_size: int, window: int | None) -> None:
    rows = [(length - 1, 1) for length in (1, 15, 16, 17, 33, 70)]
    check(make_batch(rows, page_size=page_size, heads=(4, 2)), torch.randn(4), window)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_of_prefill_chunk_decode_and_empty_rows(dtype: torch.dtype, window: int | None) -> None:
    check(make_batch(MIXED, page_size=16, dtype=dtype), torch.randn(4).to(dtype), window)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (3, 3), (17, 1)], ids=str)
def test_each_head_has_its_own_sink(heads: tuple[int, int]) -> None:
    check(make_batch([(5, 1), (0, 30), (3, 4), (9, 1)], heads=heads, page_size=16), torch.randn(heads[0]) * 3)


def test_sinks_of_rows_of_several_queries_in_the_decode_kernel() -> None:
    check(make_batch([(0, 0), (5, 2), (9, 1), (1, 0)]), torch.randn(4))


@pytest.mark.parametrize(
    ("splits", "window"), [(2, None), (8, 40), *(pytest.param(32, w, marks=pytest.mark.slow) for w in (None, 40))]
)
def test_a_sink_counts_once_whatever_the_splits(
    splits: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sinks above the scores, so that a second one would halve the result."""
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    batch = make_batch([(0, 1), (600, 1), (129, 1)], page_size=16, heads=(2, 1))
    check(batch, torch.tensor([3.0, 7.0]), window)


@pytest.mark.parametrize("lowest", [-FAR, -torch.inf])
@pytest.mark.parametrize("splits", [1, 4])
def test_sinks_far_below_and_above_the_scores(lowest: float, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    batch = make_batch([(70, 1), (0, 20), (2, 1)], page_size=16, heads=(2, 1))
    both = check(batch, torch.tensor([lowest, FAR]))
    assert both[:, 1].abs().max() == 0
    arguments = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
    without = gpu.paged_attention(*arguments, scale=SCALE, sliding_window=None, logit_softcap=None)
    torch.testing.assert_close(both[:, 0], without[:, 0])


def test_sinks_may_be_a_view() -> None:
    check(make_batch([(70, 1), (0, 20)]), torch.randn(4, 2)[:, 1])


def test_a_soft_cap_beside_sinks_is_refused() -> None:
    batch = make_batch([(3, 1)])
    arguments = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
    with pytest.raises(AssertionError, match="together"):
        gpu.paged_attention(
            *arguments, scale=SCALE, sliding_window=None, logit_softcap=2.0, sinks=torch.zeros(4, device=batch.q.device)
        )


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 12))])
def test_sinks_of_random_ragged_batches(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator, device="cpu"))

    rows = [(number(200), 1 if number(2) else number(30)) for _ in range(1 + number(5))]
    heads = [(2, 2), (4, 2), (3, 1), (8, 1)][number(4)]
    batch = make_batch(rows, page_size=[1, 2, 16][number(3)], heads=heads, seed=seed)
    check(batch, torch.randn(heads[0]) * 4, 1 + number(100) if number(2) else None)
