"""The C++ kernels against the definition: borders of panels, chunks, tiles and heads first, then random ragged batches;
and that a row's result does not depend, not in a single bit, on what is computed beside it.

python -m pytest tests/kernels/test_native.py
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from max_ray.errors import ConfigError
from max_ray.interfaces import KVCacheInputs
from max_ray.kernels import native, reference
from max_ray.kernels.native import build as building
from tests.kernels import naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PLAIN: dict[str, Any] = {"logit_softcap": None, "sinks": None}
needs_library = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within the rounding of the result's dtype, relative to numbers of size 1 and more."""
    error = (result.double() - expected).abs() / expected.abs().clamp(min=1)
    return bool((error <= TOLERANCE[result.dtype]).all())


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (31, 2), (32, 3), (33, 255), (64, 256), (65, 257), (130, 513)])
def test_linear_equals_the_definition_at_every_number_of_rows(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    packed = native.pack_weight(weight)
    assert packed is not None
    x = torch.randn(100, inputs).to(dtype)
    product = x.double() @ weight.double().T
    alone = torch.cat([packed.linear(row[None], None) for row in x])
    assert close(alone, product)
    for rows in [1, 2, 5, 6, 7, 13, 14, 15, 16, 28, 29, 32, 33, 55, 56, 57, 96, 97, 100]:
        assert torch.equal(packed.linear(x[:rows], None), alone[:rows]), f"{rows} rows"
    assert torch.equal(packed.linear(x, bias), alone + bias)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_takes_strided_and_deeper_inputs_and_no_rows(dtype: torch.dtype) -> None:
    packed = native.pack_weight(torch.randn(40, 20).to(dtype))
    assert packed is not None
    wide = torch.randn(3, 60).to(dtype)
    assert torch.equal(packed.linear(wide[:, 20:40], None), packed.linear(wide[:, 20:40].contiguous(), None))
    assert torch.equal(packed.linear(wide.view(3, 3, 20), None)[1], packed.linear(wide[1].view(3, 20), None))
    assert packed.linear(wide[:0, :20], None).shape == (0, 40)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_more_rows_than_its_cache_share(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 8192).to(dtype)
    packed, x = native.pack_weight(weight), torch.randn(600, 8192).to(dtype)
    assert packed is not None
    y = packed.linear(x, None)
    for row in (0, 255, 256, 599):
        assert torch.equal(y[row : row + 1], packed.linear(x[row : row + 1], None))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_packed_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 33).to(dtype)
    packed, indices = native.pack_weight(weight), torch.tensor([69, 0, 31, 32, 0])
    assert packed is not None
    assert torch.equal(packed.rows(indices), weight[indices])
    assert packed.rows(indices[:0]).shape == (0, 33)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    packed, x = native.pack_weight(torch.randn(500, 300)), torch.randn(40, 300)
    assert packed is not None
    before, few = torch.get_num_threads(), packed.linear(x, None)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(packed.linear(x, None), few)
    finally:
        torch.set_num_threads(before)


def test_what_no_kernel_reads_is_not_packed() -> None:
    assert native.pack_weight(torch.ones(4, 4, dtype=torch.float64)) is None
    assert native.pack_weight(torch.ones(4, dtype=torch.float32)) is None
    assert native.pack_weight(torch.ones(0, 4)) is None


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 17), (4, 2048), (2, 3, 40), (0, 8)])
def test_elementwise(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = (torch.randn(shape).to(dtype) * 3 for _ in range(2))
    weight = torch.randn(shape[-1]).to(dtype)
    assert close(native.rmsnorm(x, weight, 1e-5), reference.rmsnorm(x.double(), weight.double(), 1e-5))
    normed, total = native.fused_add_rmsnorm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, native.rmsnorm(total, weight, 1e-5))
    both = torch.cat([x, residual], -1)
    assert close(native.silu_and_mul(both), reference.silu_and_mul(both.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).view(64, 1024)
    for other in (0.0, 1.0, -0.37, 60_000.0, 1e-7):
        _, total = native.fused_add_rmsnorm(every, torch.full_like(every, other), torch.ones(1024, dtype=dtype), 1e-6)
        assert torch.equal(total.nan_to_num(7.0, 8.0, 9.0), (every + other).nan_to_num(7.0, 8.0, 9.0))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 32, 1000])
def test_gather_rows(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(7, 2 * width).to(dtype)[:, ::1]
    rows = torch.tensor([6, 0, 0, 3])
    for table in (x, x[:, :width], x[1:, width:]):
        index = rows.clamp(max=len(table) - 1)
        assert torch.equal(native.gather_rows(table, index), table[index])
    assert native.gather_rows(x, rows[:0]).shape == (0, 2 * width)
    strided = x[:, ::2]
    assert torch.equal(native.gather_rows(strided, rows), strided[rows]), "the reference implementation's"


@needs_library
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_slots_and_positions_of_a_decode_step(page_size: int) -> None:
    lengths = torch.tensor([0, 1, page_size - 1, page_size, 3 * page_size + 1], dtype=torch.int32)
    tables = torch.randint(0, 1000, (5, 6), dtype=torch.int32)[:, :5]
    expected = reference.decode_slots(tables, lengths, page_size)
    assert torch.equal(native.decode_slots(tables, lengths, page_size), expected)
    slots = [int(tables[i, n // page_size]) * page_size + n % page_size for i, n in enumerate(lengths.tolist())]
    assert expected.tolist() == slots
    assert native.positions(lengths).tolist() == reference.positions(lengths).tolist() == lengths.tolist()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 32, 1000])
def test_argmax_takes_the_first_of_the_largest(dtype: torch.dtype, width: int) -> None:
    x = torch.randint(-3, 3, (40, width + 3)).to(dtype)[:, :width]
    first = [row.index(max(row)) for row in x.tolist()]
    assert native.argmax(x).tolist() == first
    assert native.argmax(torch.full((2, width), -torch.inf).to(dtype)).tolist() == [0, 0]
    assert native.argmax(x[:0]).tolist() == []


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_rows_are_added_in_order(count: int, width: int, dtype: torch.dtype) -> None:
    rows = (torch.randn(count, width) * 100).to(dtype)
    got, expected = torch.empty(2, width, dtype=dtype)
    native.sum_rows(rows, got)
    reference.sum_rows(rows, expected)
    assert torch.equal(got, expected)


@needs_library
def test_silu_of_very_large_and_very_small_gates() -> None:
    gate = torch.tensor([[-1e4, -100, -88, -20, 0, 20, 88, 100, 1e4]])
    x = torch.cat([gate, torch.ones_like(gate)], 1)
    assert torch.allclose(native.silu_and_mul(x), torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-30)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(16, 16), (64, 64), (64, 16), (80, 20), (24, 24)])
@pytest.mark.parametrize("gathered", [False, True])
def test_rope_and_append(dtype: torch.dtype, interleaved: bool, head_dim: int, rotated: int, gathered: bool) -> None:
    qkv = torch.randn(5, 6 * head_dim).to(dtype)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in qkv.split([4 * head_dim, head_dim, head_dim], 1))
    angles = torch.rand(9, rotated) * 6
    cos_sin = torch.cat([angles[:, : rotated // 2].cos(), angles[:, : rotated // 2].sin()], 1)
    positions, slots = torch.tensor([8, 0, 3, 3, 1]), torch.tensor([5, 0, 2, 7, 1])
    cache = torch.full((2, 2, 4, 1, head_dim), 7.0).to(dtype)
    expected_cache = cache.double()
    where = (cos_sin[positions], None) if gathered else (cos_sin, positions)
    out = native.rope_and_append(q, k, v, *cache, *where, slots, interleaved=interleaved)
    angles_used = cos_sin.to(dtype).double()
    exact = reference.rope_and_append(
        q.double(), k.double(), v.double(), *expected_cache, angles_used, positions, slots, interleaved=interleaved
    )
    assert close(out, exact)
    assert close(cache, expected_cache)


def ragged(
    rows: Sequence[tuple[int, int]], heads: tuple[int, int], head_dim: int, page_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KVCacheInputs, torch.Tensor]:
    """rows: (tokens in the cache before, new tokens). Blocks in random order; what no row owns is NaN."""
    needed = [-(-(cached + new) // page_size) for cached, new in rows]
    order = torch.randperm(sum(needed)).tolist()
    caches = torch.full((2, sum(needed), page_size, heads[1], head_dim), torch.nan).to(dtype)
    tables = torch.zeros(len(rows), max(needed), dtype=torch.int32)
    for row, (cached, new) in enumerate(rows):
        blocks = [order.pop() for _ in range(needed[row])]
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for position in range(cached + new):
            place = blocks[position // page_size], position % page_size
            caches[:, place[0], place[1]] = torch.randn(2, heads[1], head_dim).to(dtype)
    lengths = torch.tensor([cached for cached, _ in rows], dtype=torch.int32)
    counts = [new for _, new in rows]
    indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(sum(counts), heads[0], head_dim).to(dtype)
    longest = max(cached + new for cached, new in rows)
    kv = KVCacheInputs([], [], tables, lengths, torch.empty(0, dtype=torch.int64), longest, page_size)
    return q, caches[0], caches[1], kv, indptr


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((1, 1), 64), ((4, 1), 16), ((6, 2), 80), ((7, 1), 16), ((3, 3), 128)])
@pytest.mark.parametrize("window", [None, 1, 65])
def test_attention_at_the_borders_of_tiles(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, window: int | None
) -> None:
    rows = [(0, 1), (62, 1), (63, 1), (64, 1), (65, 3), (0, 33), (30, 40), (130, 2)]
    q, k, v, kv, indptr = ragged(rows, heads, head_dim, 16, dtype)
    result = native.paged_attention(q, k, v, kv, indptr, scale=0.3, sliding_window=window, **PLAIN)
    assert close(result, naive.attention(q, k, v, kv, indptr, 0.3, window))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 50])
def test_a_query_does_not_depend_on_its_chunk(dtype: torch.dtype, window: int | None) -> None:
    q, k, v, kv, indptr = ragged([(0, 150)], (4, 2), 32, 16, dtype)
    whole = native.paged_attention(q, k, v, kv, indptr, scale=0.2, sliding_window=window, **PLAIN)
    for start, stop in [(0, 1), (63, 64), (64, 65), (100, 150), (31, 97)]:
        kv.cache_lengths[0] = start
        part_indptr = torch.tensor([0, stop - start], dtype=torch.int32)
        part = native.paged_attention(
            q[start:stop], k, v, kv, part_indptr, scale=0.2, sliding_window=window, logit_softcap=None
        )
        assert torch.equal(part, whole[start:stop]), (start, stop)


@needs_library
def test_random_ragged_batches() -> None:
    generator = torch.Generator().manual_seed(1)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(25):
        rows = [(pick(0, 90), pick(1, 9)) for _ in range(pick(1, 5))]
        group, kv_heads, page = pick(1, 5), pick(1, 3), 2 ** pick(0, 5)
        window = pick(1, 80) if pick(0, 1) else None
        dtype = DTYPES[pick(0, 2)]
        q, k, v, kv, indptr = ragged(rows, (group * kv_heads, kv_heads), 16 * pick(1, 5), page, dtype)
        softcap = 2.0 if pick(0, 1) else None
        result = native.paged_attention(q, k, v, kv, indptr, scale=0.25, sliding_window=window, logit_softcap=softcap)
        assert close(result, naive.attention(q, k, v, kv, indptr, 0.25, window, softcap)), (rows, page, window)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_sinks(dtype: torch.dtype) -> None:
    q, k, v, kv, indptr = ragged([(0, 1), (64, 1), (3, 70)], (4, 2), 32, 16, dtype)
    options: dict[str, Any] = {"scale": 0.3, "sliding_window": 40, "logit_softcap": None, "sinks": torch.randn(4)}
    result = native.paged_attention(q, k, v, kv, indptr, **options)
    assert close(result, reference.paged_attention(q, k, v, kv, indptr, **options).double())


@pytest.fixture
def build_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], object]:
    """Builds as if for the first time, into an empty folder."""
    monkeypatch.setenv("MAX_RAY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(building._logger, "propagate", True)
    return building.library.__wrapped__


def test_a_machine_without_a_compiler_says_so(
    build_anew: Callable[[], object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    assert build_anew() is None
    assert "No C++ compiler" in caplog.text


def test_a_compiler_that_fails_leaves_the_reference(
    build_anew: Callable[[], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'no such flag: -march=native' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(building.shutil, "which", lambda name: str(compiler))
    caplog.set_level(logging.WARNING)
    assert build_anew() is None
    assert "no such flag: -march=native" in caplog.text


def test_switched_off_by_the_environment(build_anew: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_RAY_NATIVE", "0")
    assert build_anew() is None
    monkeypatch.setenv("MAX_RAY_NATIVE", "maybe")
    with pytest.raises(ConfigError, match="MAX_RAY_NATIVE must be 0 or 1"):
        build_anew()


@needs_library
def test_the_library_s_folder_is_private_and_what_others_may_change_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAX_RAY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(building, "_SOURCES", tmp_path / "src")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "one.cpp").write_text('extern "C" int one() { return 1; }')
    fresh = building.library.__wrapped__
    assert fresh().one() == 1
    (file,) = (tmp_path / "native").glob("*.so")
    assert (tmp_path / "native").stat().st_mode & 0o777 == 0o700

    file.chmod(0o666)
    assert fresh() is None
    assert "may be changed by other users" in caplog.text

    (tmp_path / "native").chmod(0o777)  # a planted library is compiled again, not loaded
    file.unlink()  # the loaded one stays mapped
    file.write_text("planted")
    file.chmod(0o644)
    assert fresh().one() == 1
    assert "compiled again" in caplog.text
