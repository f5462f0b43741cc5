"""A pipeline without a model, whose tokens still depend on the KV cache being right.

The "cache" holds the token that was written into each slot. Every step reads a row's whole past back through its
block table, checks it against the context, and derives the next token from what it read: a block shared wrongly,
given away too early or not covering the run gives another token or an assertion.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from max_ray.interfaces import (
    CacheReply,
    CacheUpdate,
    KVCacheParams,
    RequestID,
    RunRow,
    SamplingParams,
    TextContext,
    TextGenerationInputs,
    TextGenerationOutput,
    TokenBuffer,
)
from max_ray.kv_cache import LocalKVCacheClient, PagedKVCacheManager

VOCABULARY = 50


def next_token(past: list[int]) -> int:
    return (sum((i + 3) * t for i, t in enumerate(past)) + 7 * len(past)) % VOCABULARY


def expected_tokens(context_tokens: list[int], num_new: int) -> list[int]:
    """What a request generates, whoever else runs."""
    past = list(context_tokens)
    for _ in range(num_new):
        past.append(next_token(past))
    return past[len(context_tokens) :]


def make_context(name: str, prompt: Iterable[int], max_new_tokens: int = 8, priority: int = 0) -> TextContext:
    return TextContext(
        request_id=RequestID(name),
        tokens=TokenBuffer(list(prompt)),
        max_length=100_000,
        sampling_params=SamplingParams(max_new_tokens=max_new_tokens),
        priority=priority,
    )


@dataclass
class Run:
    """What one run was asked for, and how many steps it made. rows: (id, tokens of the first step)."""

    num_steps: int
    rows: dict[str, int]
    steps_made: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(self.rows.values())


@dataclass
class FakePipeline:
    """fail_at: step number (over all runs) -> error kind: "before" the step, "lost" after the contexts were updated,
    "after" its outputs were handed out. error: what is raised then. poison: request id -> number of tokens after which
    every step with it takes the workers down. manager: the ledger's, against which each row's block table is checked.
    tables: those of the run in progress; nothing else is known of a request."""

    page_size: int
    error: Callable[[], Exception]
    manager: PagedKVCacheManager
    fail_at: dict[int, str] = field(default_factory=dict)
    poison: dict[str, int] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    tables: dict[str, list[int]] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)
    num_steps: int = 0
    num_interrupts: int = 0
    stop: bool = False
    can_extend: bool = False
    _contexts: list[TextContext] = field(default_factory=list)
    _left: dict[str, int] = field(default_factory=dict)

    async def stream(
        self, inputs: TextGenerationInputs[TextContext]
    ) -> AsyncIterator[dict[RequestID, TextGenerationOutput]]:
        contexts = inputs.flat_batch
        rows = [RunRow.from_context(context, inputs.num_steps) for context in contexts]
        run = Run(inputs.num_steps, {r.request_id: len(r.active_tokens) for r in rows})
        self.runs.append(run)
        self.stop = False
        self.tables = {row.request_id: self._checked(row.request_id, row.block_table.tolist()) for row in rows}
        left = {row.request_id: row.max_new_tokens for row in rows}
        self._contexts, self._left = contexts, left
        while run.steps_made < run.num_steps:
            step = run.steps_made
            await asyncio.sleep(0)
            self._die(self.num_steps, "before")
            self._meet_poison(contexts)
            outputs = self._step(contexts, left, is_first=step == 0)
            run.steps_made += 1
            self.num_steps += 1
            self._die(self.num_steps - 1, "lost")
            yield outputs
            self._die(self.num_steps - 1, "after")
            if self.stop or not any(left[c.request_id.value] > 0 and not c.is_done for c in contexts):
                return

    def extend(self, num_steps: int) -> None:
        run = self.runs[-1]
        for context in self._contexts:
            key = context.request_id.value
            self._left[key] = min(self._left[key] + num_steps - run.num_steps, context.remaining_new_tokens)
            if not context.is_done:
                self.tables[key] = self._checked(key, context.block_table.tolist())
        run.num_steps = num_steps

    def interrupt(self) -> None:
        self.num_interrupts += 1
        self.stop = True

    def _checked(self, key: str, table: list[int]) -> list[int]:
        assert table == self.manager.get_req_blocks(key), "the run's block table is not the ledger's"
        return table

    def _step(
        self, contexts: list[TextContext], left: dict[str, int], *, is_first: bool
    ) -> dict[RequestID, TextGenerationOutput]:
        outputs = {}
        for context in contexts:
            key = context.request_id.value
            if context.is_done or (not is_first and left[key] <= 0):
                continue
            token = self._forward(context)
            if left[key] == 0:
                context.advance()
                continue
            left[key] -= 1
            context.update(token)
            outputs[context.request_id] = TextGenerationOutput(
                request_id=context.request_id, tokens=[token], final_status=context.status
            )
        return outputs

    def _forward(self, context: TextContext) -> int:
        """Writes the active tokens, reads everything back, gives the next token."""
        slots = self._slots(context)
        for position in range(context.processed_length, context.active_end):
            self.slots[slots[position]] = int(context.tokens.all[position])
        past = [self.slots[slot] for slot in slots]
        assert past == context.tokens.all[: context.active_end].tolist(), "the cache holds other tokens"
        return next_token(past)

    def _slots(self, context: TextContext) -> list[int]:
        table = self.tables[context.request_id.value]
        assert len(table) * self.page_size >= context.active_end, "the run went beyond its lease"
        return [table[p // self.page_size] * self.page_size + p % self.page_size for p in range(context.active_end)]

    def _meet_poison(self, contexts: list[TextContext]) -> None:
        for context in contexts:
            limit = self.poison.get(context.request_id.value)
            if limit is not None and not context.is_done and context.tokens.generated_length >= limit:
                self.slots.clear()
                self.tables.clear()
                raise self.error()

    def _die(self, step: int, kind: str) -> None:
        if self.fail_at.get(step) == kind:
            del self.fail_at[step]
            self.slots.clear()
            self.tables.clear()
            raise self.error()


class CountingLedger(LocalKVCacheClient):
    """Counts exchanges, checks the books after each, and can be made to fail."""

    def __init__(self, num_blocks: int, page_size: int) -> None:
        params = KVCacheParams(dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, page_size=page_size)
        super().__init__(PagedKVCacheManager(params, num_blocks))
        self.requests: list[CacheUpdate] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_called = 0
        self._idle: list[bool] = []

    async def update(self, request: CacheUpdate) -> CacheReply:
        self.num_called += 1
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.requests.append(request)
        reply = await super().update(request)
        self.manager.assert_invariants()
        self._idle.append(not request.requests and not self.manager.request_ids)
        return reply

    @property
    def flushes(self) -> list[list[str]]:
        """What an idle loop gave back, exchange by exchange: nothing is wanted then, and nobody holds a block."""
        return [request.releases for request, is_idle in zip(self.requests, self._idle, strict=True) if is_idle]

    @property
    def used(self) -> int:
        return self.manager.total_num_blocks - self.manager.num_free_blocks
