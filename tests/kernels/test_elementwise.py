"""Normalisation, activation, rope and cache writes, against Hugging Face's Llama or the definition.

python -m pytest tests/kernels/test_elementwise.py
"""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from max_ray import kernels
from tests.kernels import naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 33), (0, 8), (2, 3, 8)])
def test_rmsnorm_equals_hugging_face(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, norm = torch.randn(shape).to(dtype) * 5, LlamaRMSNorm(shape[-1], eps=1e-3).to(dtype)
    norm.weight.data = torch.randn(shape[-1]).to(dtype)
    torch.testing.assert_close(kernels.rmsnorm(x, norm.weight.data, 1e-3), norm(x).detach())


def test_rmsnorm_of_zeros_is_zero() -> None:
    assert torch.equal(kernels.rmsnorm(torch.zeros(2, 4), torch.ones(4), 1e-6), torch.zeros(2, 4))


def test_rmsnorm_does_not_overflow_in_half_precision() -> None:
    x = torch.full((1, 8), 60_000.0, dtype=torch.float16)
    assert torch.equal(kernels.rmsnorm(x, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_add_rmsnorm_is_its_two_steps_and_leaves_its_inputs(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(4, 16).to(dtype) for _ in range(3))
    before = (x.clone(), residual.clone())
    normed, new_residual = kernels.fused_add_rmsnorm(x, residual, weight[0], 1e-5)
    assert torch.equal(new_residual, before[0] + before[1])
    assert torch.equal(normed, kernels.rmsnorm(before[0] + before[1], weight[0], 1e-5))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul_gates_with_the_first_half(dtype: torch.dtype) -> None:
    gate, up = torch.randn(3, 7).to(dtype), torch.randn(3, 7).to(dtype)
    x = torch.cat([gate, up], dim=1)
    before = x.clone()
    assert torch.equal(kernels.silu_and_mul(x), torch.nn.functional.silu(gate) * up)
    assert torch.equal(x, before)


def make_rope(num_tokens: int, rotary_dim: int, max_len: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cos_sin_cache [max_len, R], positions [T], angles [T, R / 2])."""
    inv_freq = 10_000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(max_len)[:, None] * inv_freq
    positions = torch.randint(0, max_len, (num_tokens,))
    return torch.cat([angles.cos(), angles.sin()], dim=1), positions, angles[positions]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_equals_hugging_face(dtype: torch.dtype) -> None:
    cache, positions, angles = make_rope(9, 16)
    q, k = torch.randn(9, 4, 16).to(dtype), torch.randn(9, 2, 16).to(dtype)
    doubled = torch.cat([angles, angles], dim=1)
    expected = apply_rotary_pos_emb(q, k, doubled.cos().to(dtype), doubled.sin().to(dtype), unsqueeze_dim=1)
    for actual, wanted in zip(kernels.apply_rope(q, k, cache, positions), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_rope_turns_pairs_and_passes_the_rest(interleaved: bool, rotary_dim: int) -> None:
    cache, positions, angles = make_rope(5, rotary_dim)
    q, k = torch.randn(5, 3, 8), torch.randn(5, 1, 8)
    for x, actual in zip((q, k), kernels.apply_rope(q, k, cache, positions, interleaved=interleaved), strict=True):
        torch.testing.assert_close(actual.double(), naive.rope(x, angles, interleaved), rtol=1e-5, atol=1e-5)


def test_rope_with_rows_gathered_before_is_the_same() -> None:
    cache, positions, _ = make_rope(5, 8)
    q, k = torch.randn(5, 3, 8), torch.randn(5, 1, 8)
    before = kernels.apply_rope(q, k, cache[positions], None)
    for actual, wanted in zip(before, kernels.apply_rope(q, k, cache, positions), strict=True):
        assert torch.equal(actual, wanted)


def test_rope_leaves_its_inputs_also_when_they_are_views_of_one_tensor() -> None:
    cache, positions, angles = make_rope(5, 8)
    qkv = torch.randn(5, 5, 8)
    before = qkv.clone()
    q, _ = kernels.apply_rope(qkv[:, :3], qkv[:, 3:4], cache, positions)
    assert torch.equal(qkv, before)
    torch.testing.assert_close(q.double(), naive.rope(before[:, :3], angles, False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_its_slots_and_nothing_else(dtype: torch.dtype) -> None:
    page_size, num_blocks = 4, 5
    k_cache, v_cache = (torch.randn(num_blocks, page_size, 2, 8).to(dtype) for _ in range(2))
    k, v = torch.randn(3, 2, 8).to(dtype), torch.randn(3, 2, 8).to(dtype)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    slots = [(4, 3), (0, 0), (2, 1)]
    for token, slot in enumerate(slots):
        expected_k[slot], expected_v[slot] = k[token], v[token]
    slot_mapping = torch.tensor([block * page_size + offset for block, offset in slots])
    kernels.append_paged_kv_cache(k, v, k_cache, v_cache, slot_mapping)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


def test_append_takes_views_of_a_fused_projection() -> None:
    k_cache, v_cache = torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4)
    qkv = torch.randn(2, 12)
    k, v = qkv[:, 4:8].view(2, 1, 4), qkv[:, 8:].view(2, 1, 4)
    kernels.append_paged_kv_cache(k, v, k_cache, v_cache, torch.tensor([3, 0]))
    assert torch.equal(k_cache[1, 1], k[0])
    assert torch.equal(v_cache[0, 0], v[1])


def test_an_append_of_no_tokens_changes_nothing() -> None:
    cache, none = torch.ones(1, 2, 1, 4), torch.empty(0, 1, 4)
    kernels.append_paged_kv_cache(none, none, cache, cache, torch.empty(0, dtype=torch.int64))
    assert torch.equal(cache, torch.ones(1, 2, 1, 4))
