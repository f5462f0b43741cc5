"""The C++ attention over latents: equal to a loop, and, bit by bit, the same for a token alone, in any piece of its
prompt, in any batch and with any number of threads.

python -m pytest tests/kernels/test_native_latent.py
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from max_ray import kernels
from max_ray.interfaces import KVCacheInputs
from max_ray.kernels import native, reference

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# heads, P, R, L, V, tokens a page: whole vectors, and what fills none
SHAPES = [(1, 16, 16, 32, 16, 16), (3, 5, 8, 24, 10, 4), (5, 33, 7, 73, 17, 1), (16, 128, 64, 512, 128, 64)]
Shape = tuple[int, int, int, int, int, int]


class Case:
    """Rows of one length each, whose latents lie in shuffled blocks; a query and a result for every token."""

    def __init__(self, shape: Shape, lengths: Sequence[int], dtype: torch.dtype) -> None:
        heads, plain, rope, latent, value, self.page = shape
        generator = torch.Generator().manual_seed(0)

        def numbers(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator).to(dtype)

        self.lengths, self.scale = lengths, (plain + rope) ** -0.5
        self.up = (numbers(heads, plain + value, latent).float() / latent**0.5).to(dtype)
        self.queries = [numbers(length, heads, plain + rope) for length in lengths]
        self.latents = [numbers(length, latent + rope) for length in lengths]
        counts = [-(-length // self.page) for length in lengths]
        blocks = torch.randperm(sum(counts), generator=generator).split(counts)
        self.cache = torch.full((sum(counts), self.page, 1, latent + rope), torch.nan, dtype=dtype)
        self.tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for row, own in enumerate(blocks):
            self.tables[row, : len(own)] = own
            positions = torch.arange(lengths[row])
            slots = own[positions // self.page] * self.page + positions % self.page
            kernels.append_latent(self.latents[row], self.cache, slots)

    def run(self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> torch.Tensor:
        """Tokens [start, stop) of these rows in one batch."""
        kv = KVCacheInputs(
            keys=[self.cache],
            values=[self.cache[..., :0]],
            block_tables=self.tables[list(rows)],
            cache_lengths=torch.tensor(starts, dtype=torch.int32),
            slot_mapping=torch.empty(0, dtype=torch.int64),
            max_kv_length=max(stops),
            page_size=self.page,
        )
        sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
        indptr = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        q = torch.cat([self.queries[row][start:stop] for row, start, stop in zip(rows, starts, stops, strict=True)])
        return kernels.latent_attention(q, self.cache, kv, indptr, up=self.up, scale=self.scale)

    def whole(self, row: int) -> torch.Tensor:
        return self.run([row], [0], [self.lengths[row]])

    def expected(self, row: int) -> torch.Tensor:
        """By the definition, in float64: keys and values of every head made from the latents."""
        q, latents, up = (x.double() for x in (self.queries[row], self.latents[row], self.up))
        latent_dim = up.shape[2]
        plain = q.shape[2] - (latents.shape[1] - latent_dim)
        keys = torch.einsum("sl,hpl->hsp", latents[:, :latent_dim], up[:, :plain])
        scores = torch.einsum("nhp,hsp->hns", q[..., :plain], keys) + q[..., plain:].transpose(0, 1) @ (
            latents[:, latent_dim:].T
        )
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = (scores * self.scale).masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hns,sl,hvl->nhv", weights, latents[:, :latent_dim], up[:, plain:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: Shape, dtype: torch.dtype) -> None:
    case = Case(shape, [1, 2, 63, 64, 65, 200], dtype)
    for row in range(len(case.lengths)):
        torch.testing.assert_close(case.whole(row).double(), case.expected(row), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_equal_the_whole(shape: Shape, dtype: torch.dtype) -> None:
    case = Case(shape, [150], dtype)
    whole = case.whole(0)
    for size in (1, 2, 3, 8, 16, 64, 129):
        pieces = [case.run([0], [start], [min(150, start + size)]) for start in range(0, 150, size)]
        assert torch.equal(torch.cat(pieces), whole), f"pieces of {size}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_prompts_chunks_and_decode_rows_equals_each_alone(shape: Shape, dtype: torch.dtype) -> None:
    lengths = [1, 7, 64, 65, 100, 130, 33, 80]
    case = Case(shape, lengths, dtype)
    rows, starts = list(range(8)), [0, 6, 63, 0, 40, 129, 33, 79]  # row 6 is empty
    got = case.run(rows, starts, lengths).split([stop - start for start, stop in zip(starts, lengths, strict=True)])
    for row, result in enumerate(got):
        assert torch.equal(result, case.whole(row)[starts[row] :]), f"row {row}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_number_of_threads_changes_nothing(threads: int, dtype: torch.dtype) -> None:
    case = Case(SHAPES[-1], [70, 40], dtype)
    before, expected = torch.get_num_threads(), [case.whole(0), case.run([0, 1], [69, 39], [70, 40])]
    torch.set_num_threads(threads)
    try:
        assert torch.equal(case.whole(0), expected[0])
        assert torch.equal(case.run([0, 1], [69, 39], [70, 40]), expected[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_and_batches(seed: int) -> None:
    """Against the definition, and in a random batch of random pieces against the whole."""
    rng = random.Random(seed)
    latent = rng.randint(1, 96)
    rope = -latent % 16 + 16 * rng.randint(0, 3)
    shape = (rng.randint(1, 40), rng.randint(1, 50), rope, latent, rng.randint(1, 50), rng.choice([1, 3, 16, 64, 128]))
    lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 4))]
    for dtype in DTYPES:
        case = Case(shape, lengths, dtype)
        stops = [rng.randint(1, length) for length in lengths]
        starts = [rng.randint(0, stop - 1) for stop in stops]
        pieces = case.run(range(len(lengths)), starts, stops).split([b - a for a, b in zip(starts, stops, strict=True)])
        for row, piece in enumerate(pieces):
            whole = case.whole(row)
            torch.testing.assert_close(whole.double(), case.expected(row), atol=TOLERANCE[dtype], rtol=0)
            assert torch.equal(piece, whole[starts[row] : stops[row]]), f"{shape} {dtype} row {row}"


def test_matrix_registers_are_shared_with_torch() -> None:
    """Its products of bfloat16 set the same registers of the processor."""
    case = Case(SHAPES[-1], [70], torch.bfloat16)
    a = torch.randn(128, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    product, attended = a @ a.T, case.whole(0)
    for _ in range(3):
        assert torch.equal(a @ a.T, product)
        assert torch.equal(case.whole(0), attended)


def test_other_sizes_and_mixed_dtypes_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def spy(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        calls.append(q.dtype)
        return q

    monkeypatch.setattr(reference, "latent_attention", spy)
    Case((2, 4, 3, 5, 6, 4), [3], torch.float32).whole(0)  # a latent of 8 numbers
    mixed = Case(SHAPES[0], [3], torch.float32)
    mixed.up = mixed.up.bfloat16()
    mixed.whole(0)
    Case(SHAPES[0], [3], torch.float64).whole(0)
    assert calls == [torch.float32, torch.float32, torch.float64]
    Case(SHAPES[0], [3], torch.float32).whole(0)
    assert len(calls) == 3
