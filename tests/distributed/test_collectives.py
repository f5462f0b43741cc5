"""Collectives over a real gloo group of threads, and what a lone rank does."""

from __future__ import annotations

import pytest
import torch

from max_ray.distributed import TPGroup, all_gather, all_reduce, all_reduce_min, broadcast, collectives
from tests.nn.ranks import run_ranks

SIZES = [1, 2, 3]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_all_reduce_sums_on_every_rank(size: int, dtype: torch.dtype) -> None:
    for result in run_ranks(size, lambda tp: all_reduce(torch.full((2, 3), tp.rank + 1, dtype=dtype), tp)):
        assert result.dtype == dtype
        assert result.tolist() == [[size * (size + 1) / 2] * 3] * 2


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_gets_the_same_sum_alone_and_among_others(size: int, dtype: torch.dtype) -> None:
    """Long tensors go in parts, shorter ones whole: the sums are those in rank order either way."""
    parts = [torch.randn(257, 521, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(size)]
    expected = parts[0].float().clone()
    for part in parts[1:]:
        expected += part
    for rows in (1, 2, 3, 8, 16, 257):
        for result in run_ranks(size, lambda tp, rows=rows: all_reduce(parts[tp.rank][-rows:].clone(), tp)):
            assert torch.equal(result, expected[-rows:].to(dtype)), f"{rows} rows"


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_slices_and_shares_of_any_length(monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype) -> None:
    """Shares that do not divide evenly, several slices, the last of which may be sent whole; one call after another."""
    monkeypatch.setattr(collectives, "_SLICE_BYTES", 4096)
    monkeypatch.setattr(collectives, "_SENT_WHOLE_BYTES", 256)
    lengths = [1, 31, 32, 64, 65, 129, 511, 512, 1024, 1025, 5001]
    parts = [
        torch.randn(5001, generator=torch.Generator().manual_seed(rank)).mul(100).to(dtype) for rank in range(size)
    ]
    wide = [part if dtype is torch.int64 else part.float() for part in parts]
    expected = wide[0].clone()
    for part in wide[1:]:
        expected += part

    def rank(tp: TPGroup) -> list[torch.Tensor]:
        return [all_reduce(parts[tp.rank][:length].clone(), tp) for length in lengths]

    for results in run_ranks(size, rank):
        for length, result in zip(lengths, results, strict=True):
            assert torch.equal(result, expected[:length].to(dtype)), f"{length} numbers"


@pytest.mark.parametrize("size", SIZES)
def test_all_reduce_min(size: int) -> None:
    for result in run_ranks(size, lambda tp: all_reduce_min(torch.tensor([tp.rank, -tp.rank]), tp)):
        assert result.tolist() == [0, 1 - size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_all_gather_puts_ranks_side_by_side_on_any_axis(size: int, axis: int) -> None:
    pieces = [torch.arange(24).reshape(2, 3, 4) + 100 * rank for rank in range(size)]
    for result in run_ranks(size, lambda tp: all_gather(pieces[tp.rank], tp, axis)):
        assert torch.equal(result, torch.cat(pieces, axis))


@pytest.mark.parametrize("src", [0, 1])
def test_broadcast_from_any_rank(src: int) -> None:
    for result in run_ranks(2, lambda tp: broadcast(torch.tensor([7, tp.rank]), tp, src)):
        assert result.tolist() == [7, src]


def test_views_that_are_not_contiguous() -> None:
    def rank(tp: TPGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = (torch.arange(6).reshape(2, 3) * (tp.rank + 1)).T
        return all_gather(x, tp, 0), broadcast(x, tp, 1), all_reduce(x, tp)

    base = torch.arange(6).reshape(2, 3).T
    for gathered, sent, summed in run_ranks(2, rank):
        assert torch.equal(gathered, torch.cat([base, base * 2]))
        assert torch.equal(sent, base * 2)
        assert torch.equal(summed, base * 3)


def test_nothing_to_say() -> None:
    def rank(tp: TPGroup) -> list[torch.Size]:
        empty = torch.empty(0, 3)
        return [all_reduce(empty, tp).shape, broadcast(empty, tp).shape, all_gather(empty, tp, 1).shape]

    assert run_ranks(2, rank) == [[(0, 3), (0, 3), (0, 6)]] * 2


def test_a_lone_rank_gets_the_very_tensor_back() -> None:
    tp, x = TPGroup.single(), torch.randn(2, 2)
    assert all_reduce(x, tp) is x
    assert all_gather(x, tp, 0) is x
    assert broadcast(x, tp) is x


def test_a_group_without_transport_cannot_speak() -> None:
    tp = TPGroup(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="all_reduce on a group of 2 that has no transport"):
        all_reduce(torch.ones(1), tp)
