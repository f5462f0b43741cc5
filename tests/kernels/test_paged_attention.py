"""Paged attention against its definition: borders of pages, rows and groups first, then random ragged batches.

python -m pytest tests/kernels/test_paged_attention.py
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from max_ray import kernels
from max_ray.kernels.reference import attention as implementation
from max_ray.kernels.reference import softcap
from tests.kernels.attention_batches import SCALE, Batch, make_batch


def check(
    batch: Batch, sliding_window: int | None = None, tolerance: float = 1e-5, softcap: float | None = None
) -> None:
    actual = batch.run(sliding_window, softcap)
    assert actual.shape == batch.q.shape
    assert actual.dtype == batch.q.dtype
    torch.testing.assert_close(actual.double(), batch.expected(sliding_window, softcap), rtol=tolerance, atol=tolerance)


PAGE = 4
BORDERS = [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]


@pytest.mark.parametrize("page_size", [1, PAGE, 16])
@pytest.mark.parametrize("length", BORDERS)
def test_decode_at_page_borders(page_size: int, length: int) -> None:
    check(make_batch([(length - 1, 1)], page_size=page_size))
    check(make_batch([(length - 1, 1), (0, 1), (length + 2, 1)], page_size=page_size))


@pytest.mark.parametrize("page_size", [1, PAGE, 16])
@pytest.mark.parametrize("length", BORDERS)
def test_prefill_at_page_borders(page_size: int, length: int) -> None:
    check(make_batch([(0, length)], page_size=page_size))


@pytest.mark.parametrize("cached", BORDERS)
@pytest.mark.parametrize("new", BORDERS)
def test_chunks_at_page_borders(cached: int, new: int) -> None:
    check(make_batch([(cached, new)]))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 2)])
def test_head_groups(heads: tuple[int, int]) -> None:
    check(make_batch([(5, 1), (0, 6), (3, 4), (9, 1)], heads=heads))


def test_prefill_chunk_decode_and_empty_rows_share_a_batch() -> None:
    check(make_batch([(7, 1), (4, 0), (0, 9), (5, 3), (0, 1), (0, 0), (12, 1)]))


def test_a_batch_without_tokens() -> None:
    assert make_batch([(3, 0)]).run().shape == (0, 4, 8)


def test_the_result_of_a_row_does_not_depend_on_its_batch() -> None:
    together = make_batch([(5, 1), (0, 6), (30, 1)])
    out = together.run()
    alone = Batch(together.q[:1], together.k_cache, together.v_cache, together.kv, torch.tensor([0, 1]))
    alone.kv.block_tables, alone.kv.cache_lengths = together.kv.block_tables[:1], together.kv.cache_lengths[:1]
    torch.testing.assert_close(alone.run(), out[:1])


@pytest.mark.parametrize("window", [1, 2, PAGE - 1, PAGE, PAGE + 1, 11, 100])
def test_sliding_window(window: int) -> None:
    check(make_batch([(9, 1), (0, 7), (6, 5), (0, 1), (14, 1), (2, 1), (4, 1)]), window)


@pytest.mark.parametrize("softcap", [0.1, 1.5, 50.0])
@pytest.mark.parametrize("window", [None, 1, PAGE + 1])
def test_soft_cap(softcap: float, window: int | None) -> None:
    check(make_batch([(9, 1), (0, 7), (6, 5), (0, 1), (14, 1), (2, 1)]), window, softcap=softcap)
    check(make_batch([(9, 1), (0, 7), (6, 5)], heads=(6, 2)), window, softcap=softcap)


def test_soft_capped_prompts_are_computed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softcap, "_SCORES", 100)
    check(make_batch([(0, 20), (7, 13)]), softcap=2.0)
    check(make_batch([(0, 20), (7, 13)]), 5, softcap=2.0)


def test_a_soft_cap_leaves_a_mark_and_a_large_one_none() -> None:
    batch = make_batch([(9, 1), (0, 7)])
    plain = batch.run()
    assert not torch.allclose(batch.run(softcap=0.5), plain, atol=1e-3)
    torch.testing.assert_close(batch.run(softcap=1e4), plain)


def test_a_decode_window_reads_only_the_blocks_it_sees() -> None:
    batch = make_batch([(40, 1), (24, 1)])
    expected = batch.run(sliding_window=6)
    batch.kv.block_tables[:, :4] = 10**6  # reading these would be an index error
    torch.testing.assert_close(batch.run(sliding_window=6), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_definition(dtype: torch.dtype) -> None:
    check(make_batch([(20, 1), (0, 9), (5, 4), (33, 1)], dtype=dtype), tolerance=2e-2)


def test_later_layers_of_a_step_use_the_plan_of_the_first() -> None:
    batch = make_batch([(9, 1), (0, 7), (6, 5)])
    first = batch.run()
    plans = {key: list(calls) for key, calls in batch.kv.plans.items()}
    args = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
    torch.testing.assert_close(kernels.paged_attention(*args, scale=SCALE), first)
    kernels.paged_attention(*args, scale=SCALE, sliding_window=4)
    assert len(plans) == 1
    assert len(batch.kv.plans) == 2, "a layer with another window has another plan"
    assert all(batch.kv.plans[key][0] is calls[0] for key, calls in plans.items())


def test_decode_rows_are_attended_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = implementation.F.scaled_dot_product_attention
    monkeypatch.setattr(
        implementation.F,
        "scaled_dot_product_attention",
        lambda q, *a, **k: (calls.append(q.shape), real(q, *a, **k))[1],
    )
    make_batch([(length, 1) for length in range(32)]).run()
    assert calls == [(32, 2, 2, 8)]  # [B, KVH, G, D]


def rows_of(*lengths: int) -> list[implementation._Row]:
    return [implementation._Row(i, i, i + 1, 0, length, 0) for i, length in enumerate(lengths)]


def test_groups_are_bounded_in_keys_and_in_padding() -> None:
    def lengths(groups: list[list[implementation._Row]]) -> list[list[int]]:
        return [[row.kv_len for row in group] for group in groups]

    assert lengths(list(implementation._decode_groups(rows_of(3, 60, 5), 1000))) == [[60, 5, 3]]
    assert lengths(list(implementation._decode_groups(rows_of(10, 1000, 900), 10_000))) == [[1000, 900], [10]]
    assert lengths(list(implementation._decode_groups(rows_of(50, 50, 50), 100))) == [[50, 50], [50]]
    assert lengths(list(implementation._decode_groups(rows_of(500, 400), 100))) == [[500], [400]]
    assert list(implementation._decode_groups([], 100)) == []


def test_many_groups_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([(length, 1) for length in (0, 3, 200, 70, 150, 9)])
    expected = batch.run()
    monkeypatch.setattr(implementation, "_GROUP_BYTES", 1)
    torch.testing.assert_close(batch.run(), expected)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12) | st.just(1)), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 2, 16]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.floats(0.1, 60),
    seed=st.integers(0, 1000),
)
def test_random_ragged_batches(
    rows: list[tuple[int, int]],
    page_size: int,
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    check(make_batch(rows, page_size=page_size, heads=heads, seed=seed), window, softcap=softcap)
