"""What `max-ray benchmark kernels` measures: each kernel of a decoder layer and the sampler, at one model's sizes.

A case's bytes and operations are the least that the work needs: each input read once, each output written once. The
reference is that of `kernels/reference` over the same values in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from max_ray import kernels
from max_ray.benchmark.timing import num_copies
from max_ray.driver import upload
from max_ray.engine.sampling.device_draw import DeviceDraw, sampling_kernel
from max_ray.engine.sampling.draw import Filters, draw_filtered
from max_ray.engine.sampling.philox import uniforms
from max_ray.interfaces import KVCacheInputs, SamplingParams
from max_ray.kernels import reference

PAGE_SIZE = 16
_EPS = 1e-5
_COMPARED_ROWS = 256
SAMPLING_KINDS: dict[str, dict[str, Any]] = {
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95},
}


@dataclass(frozen=True)
class Case:
    """`run` and `reference` give what is compared; `error` of the two is at most `tolerance` where they agree.
    copies: `run` over inputs of their own, for timing (see `num_copies`)."""

    run: Callable[[], torch.Tensor]
    reference: Callable[[], torch.Tensor]
    nbytes: int
    flops: int
    error: Callable[[torch.Tensor, torch.Tensor], float]
    tolerance: float = 2e-2
    copies: Sequence[Callable[[], torch.Tensor]] = ()

    @property
    def calls(self) -> list[Callable[[], torch.Tensor]]:
        """What is timed."""
        return [self.run, *self.copies]


CaseMaker = Callable[[], Case]


@dataclass(frozen=True)
class Sizes:
    """One model's, and the batches to measure. tokens: of a prefill step. rows: of decode batches."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tokens: int
    context: int
    rows: tuple[int, ...]

    @classmethod
    def of(cls, config: dict[str, Any], tokens: int, context: int, rows: Sequence[int]) -> Sizes:
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            tokens=tokens,
            context=context,
            rows=tuple(rows),
        )


def all_cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, CaseMaker]]:
    """Names, and what makes the cases: only one case's tensors need to exist at a time."""
    make = CaseFactory(sizes, device, dtype)
    for tokens in sorted({min(64, sizes.tokens), sizes.tokens}):
        yield f"linear (torch) {tokens}", partial(make.linear, tokens, 2 * sizes.inner, sizes.hidden)
        yield f"fused_add_rmsnorm {tokens}", partial(make.norm, tokens)
        yield f"silu_and_mul {tokens}", partial(make.activation, tokens)
        yield f"rope_and_append {tokens}", partial(make.rope, tokens)
    for rows in sizes.rows:
        context = max(PAGE_SIZE, sizes.context // max(1, min(rows, 8)))
        yield f"attention decode {rows} x {context}", partial(make.attention, [(context - 1, 1)] * rows)
        yield f"latent attention decode {rows} x {context}", partial(make.latent_attention, [(context - 1, 1)] * rows)
    half, part = max(2, sizes.context // 2), max(2, sizes.context // 8)
    yield f"attention prefill 1 x {half}", partial(make.attention, [(0, half)])
    yield f"attention prefill 4 x {part} after {part}", partial(make.attention, [(part, part)] * 4)
    capped = partial(make.attention, [(0, half)], sliding_window=part, softcap=50.0)
    yield f"attention prefill 1 x {half}, window {part}, soft cap", capped
    for rows in sizes.rows:
        for name, filters in SAMPLING_KINDS.items():
            yield f"sampling {rows}, {name}", partial(make.sampling, rows, filters)


class CaseFactory:
    """Makes cases of one model's sizes."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self._sizes, self._device, self._dtype = sizes, device, dtype

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device).to(self._dtype)

    def _relative(
        self, run: Callable[..., torch.Tensor], wide: Callable[..., torch.Tensor],
        inputs: Callable[[], Sequence[torch.Tensor]], nbytes: int, flops: int,
    ) -> Case:  # fmt: skip
        """inputs: makes new ones."""
        first = inputs()

        def wanted() -> torch.Tensor:
            return wide(*(x.float() for x in first))

        def copy() -> Callable[[], torch.Tensor]:
            return partial(run, *inputs())

        return Case(partial(run, *first), wanted, nbytes, flops, relative_error, copies=self._copies(copy, nbytes))

    def _copies(self, make: Callable[[], Callable[[], torch.Tensor]], nbytes: int) -> list[Callable[[], torch.Tensor]]:
        return [make() for _ in range(num_copies(nbytes, self._device) - 1)]

    def linear(self, tokens: int, rows: int, columns: int) -> Case:
        """The library's product with a weight of [rows, columns], which the rest of a layer is compared with."""
        nbytes = (tokens * columns + rows * columns + tokens * rows) * self._dtype.itemsize

        def inputs() -> Sequence[torch.Tensor]:
            return self._random(tokens, columns), self._random(rows, columns)

        return self._relative(F.linear, F.linear, inputs, nbytes, 2 * tokens * rows * columns)

    def norm(self, tokens: int) -> Case:
        hidden = self._sizes.hidden

        def inputs() -> Sequence[torch.Tensor]:
            return self._random(tokens, hidden), self._random(tokens, hidden), self._random(hidden)

        def run(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return kernels.fused_add_rmsnorm(x, residual, weight, _EPS)[0]

        def wide(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return reference.fused_add_rmsnorm(x, residual, weight, _EPS)[0]

        nbytes = 4 * tokens * hidden * self._dtype.itemsize
        return self._relative(run, wide, inputs, nbytes, 6 * tokens * hidden)

    def activation(self, tokens: int) -> Case:
        numbers = tokens * 2 * self._sizes.inner

        def inputs() -> Sequence[torch.Tensor]:
            return (self._random(tokens, 2 * self._sizes.inner),)

        nbytes = numbers * self._dtype.itemsize * 3 // 2
        return self._relative(kernels.silu_and_mul, reference.silu_and_mul, inputs, nbytes, 3 * numbers)

    def rope(self, tokens: int) -> Case:
        """With the write into the cache; what is compared are the queries, then the keys that the cache holds."""
        sizes, num_blocks = self._sizes, -(-tokens // PAGE_SIZE)
        angles = torch.rand(tokens, sizes.head_dim // 2, device=self._device) * 7
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        slots = torch.randperm(num_blocks * PAGE_SIZE, device=self._device)[:tokens]
        shape = (num_blocks, PAGE_SIZE, sizes.kv_heads, sizes.head_dim)

        def inputs() -> list[torch.Tensor]:
            return [self._random(tokens, heads, sizes.head_dim) for heads in (sizes.heads, *[sizes.kv_heads] * 2)]

        def rotate(backend: Any, qkv: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
            caches = [torch.zeros(shape, dtype=qkv[0].dtype, device=self._device) for _ in range(2)]

            def call() -> torch.Tensor:
                rotated: torch.Tensor = backend(*qkv, *caches, cos_sin, None, slots, interleaved=False)
                return rotated

            call.caches = caches  # type: ignore[attr-defined]
            return call

        qkv = inputs()
        run = rotate(kernels.rope_and_append, qkv)
        wide = rotate(reference.rope_and_append, [x.float() for x in qkv])

        def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
            pairs = zip(run.caches, wide.caches, strict=True)  # type: ignore[attr-defined]
            return max(relative_error(actual, expected), *(relative_error(a, b) for a, b in pairs))

        nbytes, flops = 2 * _bytes(*qkv) + _bytes(cos_sin, slots), 6 * (qkv[0].numel() + qkv[1].numel())
        copies = self._copies(lambda: rotate(kernels.rope_and_append, inputs()), nbytes)
        return Case(run, wide, nbytes, flops, error, copies=copies)

    def attention(
        self, rows: Sequence[tuple[int, int]], sliding_window: int | None = None, softcap: float | None = None
    ) -> Case:
        """rows: (tokens in the cache before, new tokens)."""
        sizes = self._sizes
        scores: dict[str, Any] = {"sliding_window": sliding_window, "logit_softcap": softcap}
        scores["scale"] = sizes.head_dim**-0.5

        def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KVCacheInputs, torch.Tensor]:
            kv, indptr = self._paged(rows)
            return self._random(int(indptr[-1]), sizes.heads, sizes.head_dim), kv.keys[0], kv.values[0], kv, indptr

        q, keys, values, kv, indptr = first = inputs()

        def wanted() -> torch.Tensor:
            wide = replace(kv, plans={})
            return reference.paged_attention(q.float(), keys.float(), values.float(), wide, indptr, **scores)

        window = sliding_window or 2**62
        pairs = sum(sum(min(cached + i + 1, window) for i in range(new)) for cached, new in rows)
        reads = sum(min(cached + new, window + new - 1) for cached, new in rows)
        nbytes = 2 * _bytes(q) + 2 * reads * sizes.kv_heads * sizes.head_dim * self._dtype.itemsize
        flops = 4 * pairs * sizes.heads * sizes.head_dim
        copies = self._copies(lambda: partial(kernels.paged_attention, *inputs(), **scores), nbytes)
        run = partial(kernels.paged_attention, *first, **scores)
        return Case(run, wanted, nbytes, flops, relative_error, copies=copies)

    def latent_attention(self, rows: Sequence[tuple[int, int]]) -> Case:
        """As DeepSeek-V3 has it beside heads of this size: latents four times as wide, rope keys half as wide. rows: as
        of `attention`. A latent is read once, for all heads, scores and values."""
        sizes, head_dim = self._sizes, self._sizes.head_dim
        latent_dim, rope_dim = 4 * head_dim, head_dim // 2
        up = self._random(sizes.heads, 2 * head_dim, latent_dim) / latent_dim**0.5
        scale = (head_dim + rope_dim) ** -0.5

        def inputs() -> tuple[torch.Tensor, torch.Tensor, KVCacheInputs, torch.Tensor]:
            kv, indptr = self._paged(rows, (1, latent_dim + rope_dim))
            return self._random(int(indptr[-1]), sizes.heads, head_dim + rope_dim), kv.keys[0], kv, indptr

        q, cache, kv, indptr = first = inputs()

        def wanted() -> torch.Tensor:
            wide = replace(kv, plans={})
            return reference.latent_attention(q.float(), cache.float(), wide, indptr, up=up.float(), scale=scale)

        pairs = sum(sum(cached + i + 1 for i in range(new)) for cached, new in rows)
        out = len(q) * sizes.heads * head_dim
        reads = sum(cached + new for cached, new in rows) * (latent_dim + rope_dim)
        nbytes = _bytes(q, up) + (out + reads) * self._dtype.itemsize
        flops = 2 * sizes.heads * (pairs * (2 * latent_dim + rope_dim) + len(q) * 2 * head_dim * latent_dim)
        run = partial(kernels.latent_attention, up=up, scale=scale)
        copies = self._copies(lambda: partial(run, *inputs()), nbytes)
        return Case(partial(run, *first), wanted, nbytes, flops, relative_error, copies=copies)

    def _paged(
        self, rows: Sequence[tuple[int, int]], heads: tuple[int, int] | None = None
    ) -> tuple[KVCacheInputs, torch.Tensor]:
        """Random keys and values in scattered blocks, and qo_indptr. heads: (key heads, head_dim), the model's own by
        default."""
        width = max(-(-(cached + new) // PAGE_SIZE) for cached, new in rows)
        shape = (len(rows) * width, PAGE_SIZE, *(heads or (self._sizes.kv_heads, self._sizes.head_dim)))
        tables = np.random.default_rng(0).permutation(len(rows) * width).astype(np.int32).reshape(len(rows), width)
        kv = KVCacheInputs(
            keys=[self._random(*shape)],
            values=[self._random(*shape)],
            block_tables=upload(tables, self._device),
            cache_lengths=upload(np.array([cached for cached, _ in rows], dtype=np.int32), self._device),
            slot_mapping=upload(_slots(rows, tables), self._device),
            max_kv_length=max(cached + new for cached, new in rows),
            page_size=PAGE_SIZE,
        )
        indptr = np.cumsum([0, *(new for _, new in rows)]).astype(np.int32)
        return kv, upload(indptr, self._device)

    def sampling(self, rows: int, filters: dict[str, Any]) -> Case:
        """The share of rows whose token is another one is the error, over `_COMPARED_ROWS` rows of their own: exp may
        differ in its last bit, and now and then a draw falls between. Without a kernel for draws: torch's own."""

        def draws(num_rows: int) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
            return self._draws(self._random(num_rows, self._sizes.vocab) * 3, filters)

        nbytes = rows * self._sizes.vocab * self._dtype.itemsize
        compared, expected = draws(2 if kernels.is_interpreted() else _COMPARED_ROWS)
        copies = self._copies(lambda: draws(rows)[0], nbytes)
        return Case(draws(rows)[0], expected, nbytes, 0, lambda _, b: _unequal(compared(), b), copies=copies)

    def _draws(
        self, logits: torch.Tensor, filters: dict[str, Any]
    ) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
        """(draws by the kernel, each call the next one; the first of them by the reference implementation)."""
        params = [SamplingParams(**{"temperature": 0.9, "seed": seed} | filters) for seed in range(len(logits))]
        counters = np.zeros(len(logits), dtype=np.int64)
        kernel, vocab = sampling_kernel(self._device), self._sizes.vocab

        def by_torch() -> torch.Tensor:
            numbers = upload(uniforms([p.seed for p in params], counters, 1)[:, 0], self._device)
            return draw_filtered(logits.float(), Filters.from_params(params, vocab, self._device), numbers)

        if kernel is None:
            return by_torch, by_torch
        draw = DeviceDraw(kernel, params, counters, vocab, self._device)
        return lambda: draw(logits), by_torch


def _slots(rows: Sequence[tuple[int, int]], tables: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Where the new tokens of all rows lie in the cache."""
    positions = [np.arange(cached, cached + new) for cached, new in rows]
    blocks = [table[p // PAGE_SIZE] for table, p in zip(tables, positions, strict=True)]
    return (np.concatenate(blocks).astype(np.int64) * PAGE_SIZE) + np.concatenate(positions) % PAGE_SIZE


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite where a value is no number."""
    error = float((actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def _unequal(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual != expected).float().mean())


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
