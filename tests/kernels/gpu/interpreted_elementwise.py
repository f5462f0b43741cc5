"""Triton kernels of norm, activation, rope and cache writes against the reference implementations.

TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu/interpreted_elementwise.py
"""

from __future__ import annotations

import pytest
import torch

from max_ray.kernels import gpu, reference

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of bfloat16: one unit in the last place


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(0, 2, 8), (1, 1, 1), (3, 4, 33), (5, 8, 2050)])
def test_sum_choices(tokens: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    y = torch.randn(tokens * top_k, width + 3).to(dtype)[:, 1 : width + 1]
    places = torch.randperm(tokens * top_k).view(tokens, top_k)
    weights = torch.rand(tokens, top_k)
    assert_close(gpu.sum_choices(y, places, weights), reference.sum_choices(y, places, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 33), (0, 8), (2, 1, 64), (1, 1025)])
def test_rmsnorm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype) * 5, torch.randn(shape[-1]).to(dtype)
    assert_close(gpu.rmsnorm(x, weight, 1e-3), reference.rmsnorm(x, weight, 1e-3))


def test_rmsnorm_of_a_view_and_with_a_float32_weight() -> None:
    x, weight = torch.randn(4, 20).bfloat16()[:, 3:15], torch.randn(12)
    assert_close(gpu.rmsnorm(x, weight, 1e-5), reference.rmsnorm(x, weight, 1e-5))
    assert_close(gpu.rmsnorm(x[:2].T, weight[:2], 1e-5), reference.rmsnorm(x[:2].T, weight[:2], 1e-5))


def test_rmsnorm_of_zeros_is_zero() -> None:
    assert torch.equal(gpu.rmsnorm(torch.zeros(2, 4), torch.ones(4), 1e-6), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 33), (0, 8)])
def test_fused_add_rmsnorm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, before = torch.randn(shape[1]).to(dtype), (x.clone(), residual.clone())
    normed, total = gpu.fused_add_rmsnorm(x, residual, weight, 1e-5)
    expected_normed, expected_total = reference.fused_add_rmsnorm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected_normed)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (0, 8), (1, 2, 14), (1, 2 * 2049)])
def test_silu_and_mul(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype) * 4
    assert_close(gpu.silu_and_mul(x), reference.silu_and_mul(x))


def test_silu_of_large_values_does_not_overflow() -> None:
    x = torch.tensor([[-1e4, 1e4, -200.0, 1.0, 1.0, 1.0]])
    assert_close(gpu.silu_and_mul(x), reference.silu_and_mul(x))


def angles(num_rows: int, rotated: int) -> torch.Tensor:
    turned = torch.rand(num_rows, rotated // 2) * 7
    return torch.cat([turned.cos(), turned.sin()], dim=1)


def fused_qkv(num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v as views of one projection."""
    sizes = [heads[0], heads[1], heads[1]]
    return list(torch.randn(num_tokens, sum(sizes), head_dim).to(dtype).split(sizes, dim=1))


SHAPES = [(64, 64), (80, 80), (128, 128), (256, 256), (128, 64), (8, 2), (10, 6)]
NEOX = [(*shape, False, torch.bfloat16) for shape in SHAPES]
INTERLEAVED = [(*shape, True, torch.float32) for shape in SHAPES[-3:]]
REST = [(*shape, is_interleaved, dtype) for shape in SHAPES for is_interleaved in (False, True) for dtype in DTYPES]


@pytest.mark.parametrize(
    ("head_dim", "rotated", "interleaved", "dtype"),
    [*NEOX, *INTERLEAVED, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_rope(head_dim: int, rotated: int, interleaved: bool, dtype: torch.dtype) -> None:
    q, k, _ = fused_qkv(2, (6, 2), head_dim, dtype)
    cache, positions = angles(9, rotated), torch.tensor([8, 5])
    expected = reference.apply_rope(q, k, cache, positions, interleaved=interleaved)
    for actual, wanted in zip(gpu.apply_rope(q, k, cache, positions, interleaved=interleaved), expected, strict=True):
        assert_close(actual, wanted)
    gathered = gpu.apply_rope(q, k, cache[positions], None, interleaved=interleaved)
    for actual, wanted in zip(gathered, expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize(("heads", "num_tokens"), [((1, 1), 1), ((8, 1), 0), ((8, 1), 1), ((33, 3), 2)])
def test_rope_with_head_counts_that_do_not_fill_blocks(heads: tuple[int, int], num_tokens: int) -> None:
    q, k, _ = fused_qkv(num_tokens, heads, 128, torch.float32)
    cache = angles(num_tokens, 128)
    expected = reference.apply_rope(q, k, cache, None, interleaved=False)
    for actual, wanted in zip(gpu.apply_rope(q, k, cache, None, interleaved=False), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize(
    ("head_dim", "rotated", "page_size", "dtype"),
    [(64, 64, 16, torch.bfloat16), (80, 40, 1, torch.float32), (80, 80, 16, torch.bfloat16)],
)
def test_rope_and_append(head_dim: int, rotated: int, page_size: int, dtype: torch.dtype) -> None:
    q, k, v = fused_qkv(4, (6, 3), head_dim, dtype)
    before = (q.clone(), k.clone(), v.clone())
    num_slots = 48
    caches = [torch.randn(num_slots // page_size, page_size, 3, head_dim).to(dtype) for _ in range(2)]
    expected_caches = [cache.clone() for cache in caches]
    rest = (angles(9, rotated), torch.tensor([3, 0, 8, 1]), torch.tensor([num_slots - 1, 0, 17, 16]))
    expected = reference.rope_and_append(q, k, v, *expected_caches, *rest, interleaved=False)
    assert_close(gpu.rope_and_append(q, k, v, *caches, *rest, interleaved=False), expected)
    assert_close(caches[0], expected_caches[0])
    assert torch.equal(caches[1], expected_caches[1])
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_append(num_tokens: int) -> None:
    _, k, v = fused_qkv(num_tokens, (6, 3), 10, torch.bfloat16)
    caches = [torch.randn(4, 2, 3, 10).bfloat16() for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    slots = torch.tensor([7, 0, 3])[:num_tokens]
    reference.append_paged_kv_cache(k, v, expected[0], expected[1], slots)
    gpu.append_paged_kv_cache(k, v, caches[0], caches[1], slots)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


def test_an_append_to_a_cache_that_is_no_list_of_tokens_is_refused() -> None:
    k = torch.randn(1, 2, 4)
    with pytest.raises(AssertionError, match="contiguous"):
        gpu.append_paged_kv_cache(k, k, torch.zeros(2, 2, 4, 2).mT, torch.zeros(2, 2, 2, 4), torch.tensor([0]))
    with pytest.raises(AssertionError, match="bfloat16"):
        gpu.append_paged_kv_cache(k, k, torch.zeros(2, 2, 2, 4).bfloat16(), torch.zeros(2, 2, 2, 4), torch.tensor([0]))
