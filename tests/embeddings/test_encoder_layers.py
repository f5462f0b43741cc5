"""Attention over rows of equal length, and the buckets of distances, against the plainest way to compute them."""

from __future__ import annotations

import math

import pytest
import torch

from architectures.mpnet.mpnet import distance_buckets
from max_ray.nn import encoder
from max_ray.nn.encoder import EqualRows, bidirectional_attention, equal_rows


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], reach: int | None
) -> torch.Tensor:
    """Row by row, head by head, query by query."""
    out, start = torch.zeros_like(q), 0
    for length in lengths:
        for head in range(q.shape[1]):
            for i in range(length):
                seen = [j for j in range(length) if reach is None or abs(i - j) <= reach]
                keys, values = (x[[start + j for j in seen], head] for x in (k, v))
                scores = keys @ q[start + i, head] / math.sqrt(q.shape[-1])
                out[start + i, head] = scores.softmax(0) @ values
        start += length
    return out


@pytest.mark.parametrize("reach", [None, 0, 1, 4, 30])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 2], [3, 7, 7, 7, 20]])
def test_attention(lengths: list[int], reach: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "LOCAL_CHUNK", 6)
    q, k, v = torch.randn(3, sum(lengths), 2, 4).unbind()
    attended = bidirectional_attention(q, k, v, equal_rows(lengths), reach=reach)
    torch.testing.assert_close(attended, naive_attention(q, k, v, lengths, reach), rtol=1e-5, atol=1e-5)


def test_groups() -> None:
    assert equal_rows([2, 2, 5, 9, 9]) == [EqualRows(0, 2, 2), EqualRows(4, 1, 5), EqualRows(9, 2, 9)]


def test_distance_buckets_are_those_of_transformers() -> None:
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    distances = torch.arange(-700, 701)
    expected = MPNetEncoder.relative_position_bucket(distances)
    assert torch.equal(distance_buckets(distances), expected)
