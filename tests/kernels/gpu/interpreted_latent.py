"""Triton attention over latents against the reference: decode, prefill, chunks and mixed batches at borders.

TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu/interpreted_latent.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from max_ray.interfaces import KVCacheInputs
from max_ray.kernels import gpu, reference
from max_ray.kernels.gpu import latent as implementation

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
SCALE = 0.2


@dataclass(frozen=True)
class Shape:
    """Widths of a latent, a rope key, a head's part without position and its value."""

    latent: int = 32
    rope: int = 16
    plain: int = 12
    value: int = 10


@dataclass
class Batch:
    q: torch.Tensor
    cache: torch.Tensor
    kv: KVCacheInputs
    qo_indptr: torch.Tensor
    up: torch.Tensor


def make_batch(
    rows: Sequence[tuple[int, int]],
    *,
    shape: Shape = Shape(),
    heads: int = 3,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """rows: (tokens in the cache before, new tokens). Blocks are handed out in random order; whatever no row owns is
    NaN."""
    torch.manual_seed(seed)
    num_blocks = [math.ceil((cached + new) / page_size) for cached, new in rows]
    blocks = (torch.randperm(sum(num_blocks)) + 1).split(num_blocks)
    width = shape.latent + shape.rope
    cache = torch.full((sum(num_blocks) + 1, page_size, 1, width), math.nan, dtype=dtype)
    tables = torch.zeros(len(rows), max(num_blocks, default=0), dtype=torch.int32)
    slots = []
    for row, (cached, new) in enumerate(rows):
        tables[row, : num_blocks[row]] = blocks[row]
        positions = torch.arange(cached + new)
        cache[blocks[row][positions // page_size], positions % page_size, 0] = torch.randn(cached + new, width).to(
            dtype
        )
        slots.append(blocks[row][positions // page_size][cached:] * page_size + positions[cached:] % page_size)
    indptr = torch.tensor([0, *(new for _, new in rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    kv = KVCacheInputs(
        keys=[cache],
        values=[cache[..., :0]],
        block_tables=tables,
        cache_lengths=torch.tensor([cached for cached, _ in rows], dtype=torch.int32),
        slot_mapping=torch.cat(slots),
        max_kv_length=max((cached + new for cached, new in rows), default=0),
        page_size=page_size,
    )
    q = torch.randn(int(indptr[-1]), heads, shape.plain + shape.rope).to(dtype)
    up = (torch.randn(heads, shape.plain + shape.value, shape.latent) / shape.latent**0.5).to(dtype)
    return Batch(q, cache, kv, indptr, up)


def run(backend: object, batch: Batch) -> torch.Tensor:
    batch.kv.plans.clear()
    arguments = (batch.q, batch.cache, batch.kv, batch.qo_indptr)
    result: torch.Tensor = backend.latent_attention(*arguments, up=batch.up, scale=SCALE)  # type: ignore[attr-defined]
    return result


def check(batch: Batch) -> None:
    expected, actual = run(reference, batch), run(gpu, batch)
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def force_splits(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    monkeypatch.setattr(implementation, "num_splits", lambda *_: splits)


MIXED = [(7, 1), (4, 0), (0, 9), (5, 3), (0, 1), (0, 0), (130, 1), (33, 40)]


@pytest.mark.parametrize("page_size", [1, 16])
def test_latent_decode_at_page_borders(page_size: int) -> None:
    check(make_batch([(length - 1, 1) for length in (1, 15, 16, 17, 33, 65)], page_size=page_size))


@pytest.mark.parametrize("page_size", [1, 16])
def test_latent_prefill_at_page_borders(page_size: int) -> None:
    check(make_batch([(0, length) for length in (2, 15, 16, 17, 70)], page_size=page_size))


@pytest.mark.parametrize("cached", [1, 15, 16, 17, 64, 65])
def test_latent_chunk_behind_a_cached_prefix(cached: int) -> None:
    check(make_batch([(cached, 18), (3, 2)]))


@pytest.mark.parametrize("rows", [[(0, 45)], [(0, 20)] * 3])
def test_whole_prompts_of_one_length_are_expanded_alone(
    rows: Sequence[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No product with W_uk or W_uv a head, as they are there for what came before."""
    batch = make_batch(rows)
    expected = run(reference, batch)
    monkeypatch.setattr(torch, "bmm", None)
    torch.testing.assert_close(run(gpu, batch), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("rows", "dtype"), [(MIXED, torch.float32), (MIXED[::-1], torch.bfloat16)])
def test_latents_of_prefill_chunk_decode_and_empty_rows(rows: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
    check(make_batch(rows, dtype=dtype))


@pytest.mark.parametrize("rows", [[(3, 0)], [(0, 1)], [(0, 0), (5, 1), (0, 0)], [(0, 0), (5, 2), (9, 1), (1, 0)]])
def test_latents_of_few_tokens(rows: Sequence[tuple[int, int]]) -> None:
    """More rows than tokens too: the decode kernel then takes rows of several queries."""
    check(make_batch(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3, 16, 17, pytest.param(65, marks=pytest.mark.slow)])
def test_latent_heads(heads: int, dtype: torch.dtype) -> None:
    """65 are more than one program takes, in two blocks of which the second has one less; so are 17 in float32."""
    check(make_batch([(5, 1), (0, 20), (3, 4), (9, 1)], heads=heads, dtype=dtype))


WIDTHS = [Shape(64, 32, 16, 16), Shape(24, 8), Shape(40, 20, 7, 33), Shape(5, 2, 3, 4), Shape(512, 64, 128, 128)]


@pytest.mark.parametrize("shape", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_latent_widths(shape: Shape, dtype: torch.dtype) -> None:
    check(make_batch([(37, 1), (0, 5), (3, 1)], shape=shape, dtype=dtype, heads=2))


@pytest.mark.parametrize("splits", [2, 8, pytest.param(128, marks=pytest.mark.slow)])
def test_latent_splits_beyond_a_rows_keys_count_nothing(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force_splits(monkeypatch, splits)
    check(make_batch([(0, 1), (300, 1)], heads=2))
    check(make_batch([(0, 1), (129, 1), (0, 9), (0, 0)], heads=2))
    check(make_batch([(0, 0), (150, 2), (9, 1), (1, 0)], heads=2))


def test_splits_of_latents_wider_than_a_merging_program(monkeypatch: pytest.MonkeyPatch) -> None:
    force_splits(monkeypatch, 4)
    check(make_batch([(70, 1), (0, 1)], shape=Shape(latent=200), heads=2))


def test_the_same_splits_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    force_splits(monkeypatch, 4)
    batch = make_batch([(300, 1), (90, 1)], heads=17)
    assert torch.equal(run(gpu, batch), run(gpu, batch))


def test_a_prompt_in_chunks_is_near_to_the_whole_one() -> None:
    """And its last token as a decode row."""
    batch = make_batch([(0, 50)])
    whole, slots = run(gpu, batch), batch.kv.slot_mapping
    for start, stop in ((0, 20), (20, 49), (49, 50)):
        batch.kv.cache_lengths[0] = start
        batch.kv.max_kv_length = stop
        batch.kv.slot_mapping = slots[start:stop]
        part = Batch(batch.q[start:stop], batch.cache, batch.kv, torch.tensor([0, stop - start]).int(), batch.up)
        torch.testing.assert_close(run(gpu, part), whole[start:stop], atol=1e-5, rtol=1e-5)


def test_latent_queries_may_be_a_view_of_a_projection() -> None:
    batch = make_batch([(5, 1), (0, 6)])
    batch.q = torch.randn(7, 9, 28)[:, 2:5]
    check(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_latent(dtype: torch.dtype) -> None:
    latent = torch.randn(5, 50).to(dtype)[:, 3:43]
    slots = torch.tensor([9, 0, 17, 4, 31])
    expected, actual = torch.zeros(8, 4, 1, 40, dtype=dtype), torch.zeros(8, 4, 1, 40, dtype=dtype)
    reference.append_latent(latent, expected, slots)
    gpu.append_latent(latent, actual, slots)
    assert torch.equal(actual, expected)
    gpu.append_latent(latent[:0], actual, slots[:0])
    assert torch.equal(actual, expected)


def test_splits_fill_the_gpu_and_keep_enough_keys() -> None:
    assert implementation.num_splits(1, 16, 16, 16_384, 132) == 128
    assert implementation.num_splits(8, 16, 16, 16_384, 132) == 32
    assert implementation.num_splits(1, 128, 64, 16_384, 132) == 64
    assert implementation.num_splits(256, 128, 64, 16_384, 132) == 1
    assert implementation.num_splits(1, 16, 16, 127, 132) == 1
    assert implementation.num_splits(1, 16, 16, 256, 132) == 2
    assert implementation.num_splits(1, 128, 64, 511, 132) == 1


def test_programs_share_the_heads_evenly() -> None:
    heads = {count: implementation.decode_tile(count, 512, 2, 64).heads for count in (1, 16, 64, 65, 96, 128)}
    assert heads == {1: 1, 16: 16, 64: 64, 65: 33, 96: 48, 128: 64}
    assert implementation.prefix_tile(128, 512, 2, 64).heads == 64
    assert implementation.prefix_tile(128, 512, 2, 32).heads == 32
    assert implementation.prefix_tile(128, 512, 4, 64).heads == 16


def test_tiles_of_gpus_with_less_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "widest_lines", lambda device: 32)
    check(make_batch([(7, 1), (0, 9), (0, 0), (33, 5)], heads=33, dtype=torch.bfloat16))


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 16))])
def test_latents_of_random_ragged_batches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator, device="cpu"))

    rows = [(number(200), 1 if number(2) else number(30)) for _ in range(1 + number(5))]
    shape = Shape(1 + number(70), 2 * (1 + number(12)), 1 + number(20), 1 + number(20))
    if number(2):
        force_splits(monkeypatch, 1 << number(5))
    dtype = torch.bfloat16 if number(2) else torch.float32
    heads, page_size = 1 + number(20), [1, 3, 16][number(3)]
    check(make_batch(rows, shape=shape, heads=heads, page_size=page_size, dtype=dtype, seed=seed))
