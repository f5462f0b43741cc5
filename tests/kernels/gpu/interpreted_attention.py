"""Triton paged attention against the reference implementation: prefill, decode and mixed batches at borders.

TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu/interpreted_attention.py
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from max_ray.kernels import gpu, reference
from max_ray.kernels.gpu import attention
from tests.kernels.attention_batches import SCALE, Batch, make_batch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


def check(batch: Batch, sliding_window: int | None = None, softcap: float | None = None) -> None:
    arguments = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
    batch.kv.plans.clear()
    scores = {"scale": SCALE, "sliding_window": sliding_window, "logit_softcap": softcap}
    expected = reference.paged_attention(*arguments, **scores)
    actual = gpu.paged_attention(*arguments, **scores)
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


MIXED = [(7, 1), (4, 0), (0, 9), (5, 3), (0, 1), (0, 0), (130, 1), (33, 40)]


@pytest.mark.parametrize("page_size", [1, 16])
def test_decode_at_page_borders(page_size: int) -> None:
    check(make_batch([(length - 1, 1) for length in (1, 16, 17, 64, 65, 130)], page_size=page_size, heads=(2, 1)))


@pytest.mark.parametrize("page_size", [1, 16])
def test_prefill_at_page_borders(page_size: int) -> None:
    check(make_batch([(0, length) for length in (2, 15, 16, 17, 70)], page_size=page_size, heads=(2, 1)))


@pytest.mark.parametrize(("rows", "dtype"), [(MIXED, torch.float32), (MIXED[::-1], torch.bfloat16)])
def test_prefill_chunk_decode_and_empty_rows_share_a_batch(rows: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
    check(make_batch(rows, page_size=16, dtype=dtype))


@pytest.mark.parametrize("rows", [[(3, 0)], [(0, 1)], [(0, 0), (5, 1), (0, 0)], [(0, 0), (5, 2), (9, 1), (1, 0)]])
def test_few_tokens(rows: Sequence[tuple[int, int]]) -> None:
    """More rows than tokens too: the decode kernel then takes rows of several queries."""
    check(make_batch(rows))


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    rows = [(5, 1), (0, 20), (150, 1)]
    check(make_batch(rows, page_size=16, head_dim=head_dim, heads=(2, 1), dtype=dtype))


MORE_HEADS = [pytest.param((group, 1), marks=pytest.mark.slow) for group in (2, 3, 4, 6, 7)]


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1), (8, 1), (24, 1), *MORE_HEADS], ids=str)
def test_head_groups(heads: tuple[int, int]) -> None:
    check(make_batch([(5, 1), (0, 30), (3, 4), (9, 1)], heads=heads, page_size=16))


@pytest.mark.parametrize("window", [1, 16, 17, *(pytest.param(w, marks=pytest.mark.slow) for w in (15, 1000))])
def test_sliding_window(window: int) -> None:
    check(make_batch([(70, 1), (0, 37), (50, 20), (0, 1)], page_size=16, heads=(2, 1)), window)
    check(make_batch([(300, 1), (2, 1)], page_size=16, heads=(2, 1)), window)


@pytest.mark.parametrize(
    ("softcap", "window"), [(50.0, None), (0.3, 17), *(pytest.param(2.0, w, marks=pytest.mark.slow) for w in (1, 1000))]
)
def test_soft_cap(softcap: float, window: int | None) -> None:
    check(make_batch([(70, 1), (0, 37), (50, 20), (0, 1)], page_size=16, heads=(2, 1)), window, softcap)
    check(make_batch([(300, 1), (2, 1)], page_size=16, heads=(2, 1)), window, softcap)


def test_soft_cap_in_bfloat16() -> None:
    check(make_batch([(70, 1), (0, 37)], page_size=16, heads=(2, 1), dtype=torch.bfloat16), None, 5.0)


@pytest.mark.parametrize(
    ("splits", "window"),
    [(2, None), (8, 40), *(pytest.param(32, window, marks=pytest.mark.slow) for window in (None, 40))],
)
def test_splits_beyond_a_rows_keys_count_nothing(
    splits: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    check(make_batch([(0, 1), (600, 1)], page_size=16, heads=(2, 1)), window)
    check(make_batch([(0, 1), (129, 1), (0, 9), (0, 0)], page_size=16, heads=(2, 1)), window)


def test_rows_at_the_borders_of_tiles() -> None:
    """16 queries of 8 heads fill a tile of 128 lines; spare tiles must write nothing."""
    rows = [(0, 16), (3, 32), (0, 15), (5, 17), (0, 2), (2, 48), (0, 1), (7, 16)]
    check(make_batch(rows, heads=(8, 1), page_size=16))


def test_a_decode_window_reads_only_the_blocks_it_sees() -> None:
    batch = make_batch([(70, 1), (64, 1)], page_size=16)
    batch.kv.block_tables[:, :3] = 10**6  # reading these would be a crash
    arguments = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
    gpu.paged_attention(*arguments, scale=SCALE, sliding_window=17, logit_softcap=None)


def test_queries_may_be_a_view_of_a_projection() -> None:
    batch = make_batch([(5, 1), (0, 6)])
    wide = torch.randn(7, 9, 8)
    batch.q = wide[:, 2:6]
    check(batch)


def test_splits_fill_the_gpu_and_keep_enough_keys() -> None:
    assert attention.num_splits(1, 8, 8192, 132) == 32
    assert attention.num_splits(8, 8, 8192, 132) == 4
    assert attention.num_splits(256, 8, 8192, 132) == 1
    assert attention.num_splits(1, 8, 127, 132) == 1
    assert attention.num_splits(1, 8, 256, 132) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_ragged_batches(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    rows = [(number(300), 1 if number(2) else number(40)) for _ in range(1 + number(8))]
    heads = [(2, 2), (4, 2), (3, 1), (8, 1)][number(4)]
    batch = make_batch(rows, page_size=[1, 2, 16][number(3)], heads=heads, seed=seed)
    check(batch, 1 + number(100) if number(2) else None)
