"""Who runs next. Synchronous and without side effects beyond its own tables and the contexts: easily tested.

A request is a Row and is in one of three places:

    waiting   in order of arrival; holds no block. Preempted rows come back to the front
    running   in the same order (each one older than all waiting ones); holds blocks for at least all its tokens' steps
              to come in this run, its whole prompt included
    gone      ended; its id is in `releases` until the next exchange

One decision = `decide()` (what to ask of the ledger), one exchange, `apply()` (the batch that its answer allows).
Decode rows come first, then prompts within the token budget, oldest first. A prompt whose beginning another row is
computing waits for it, and lets others pass. The oldest running row is never preempted,
so somebody always makes progress. A row that took part in runs that failed is a suspect: it comes in alone and runs
alone, while the others keep their blocks and pause, until a token clears it.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from max_ray.errors import InsufficientBlocksError
from max_ray.interfaces import LeaseGrant, LeaseReply, LeaseRequest, LeaseWant, TextContext
from max_ray.kv_cache import commit_hashes, insufficient_blocks, lookup_hashes, tokens_to_cover
from max_ray.scheduler.prefixes import KnownPrefixes, PrefixesInProgress
from max_ray.scheduler.row import Batch, Decision, Row, SchedulerLimits
from max_ray.scheduler.stats import SchedulerStats


class Batcher:
    """The tables of waiting and running rows, and the rules."""

    def __init__(self, limits: SchedulerLimits, page_size: int, total_blocks: int, stats: SchedulerStats) -> None:
        self.limits = limits
        self.stats = stats
        self.waiting: OrderedDict[str, Row] = OrderedDict()
        self.running: OrderedDict[str, Row] = OrderedDict()
        self._releases: list[str] = []
        self._commits: list[tuple[str, int, list[bytes]]] = []
        self._is_tight = False
        self._must_preempt = False
        self.use_ledger(page_size, total_blocks)

    def use_ledger(self, page_size: int, total_blocks: int) -> None:
        """From now on decisions go to an empty ledger of this shape. No row may be running."""
        assert not self.running
        self.page_size = page_size
        self.total_blocks = total_blocks
        self.free_blocks = total_blocks
        self._num_given_back = 0  # blocks, since the last message to the ledger
        self._known_prefixes = KnownPrefixes(total_blocks)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def has_releases(self) -> bool:
        return bool(self._releases)

    # One decision.

    def decide(self) -> Decision:
        """Makes room for the running rows, picks who may come in, and writes the message to the ledger."""
        self._fail_oversized()
        self._make_room()
        candidates, hopeful = self._candidates()
        num_steps = self._num_steps(candidates)
        for row in self.running.values():
            self._commit(row)
        wants = [self._want(row, num_steps) for row in self.running.values() if self._missing(row.context, num_steps)]
        wants += [self._want(row, num_steps) for row in candidates] + [self._want(row, 1) for row in hopeful]
        return Decision(self._message(wants), candidates + hopeful, num_steps)

    def apply(self, decision: Decision, reply: LeaseReply) -> Batch:
        """Takes the grants in and forms the batch: empty when nobody can run before another decision."""
        self._take(decision, reply)
        self._admit(decision.candidates, reply)
        rows = self._assemble()
        self._must_preempt = any(not self._has_room(row) for row in self.running.values())
        if not rows:
            self._unstick(decision)
        return Batch(rows, self._common_steps(rows, decision.num_steps))

    def decide_extension(self, rows: list[Row], steps_left: int) -> Decision | None:
        """What the run of `rows` needs to go on for `max_num_steps` after its `steps_left`. None where it should end:
        its rows do, somebody could take part in another run, or blocks are missing."""
        num_steps = steps_left + self.limits.max_num_steps
        present = [row for row in rows if self.running.get(row.key) is row]
        if all(row.context.remaining_new_tokens <= steps_left for row in present) or len(present) < len(self.running):
            return None
        if self.waiting and len(self.running) < self.limits.max_batch_size:
            return None
        if sum(self._missing(row.context, num_steps) for row in present) > self.free_blocks:
            return None
        for row in present:
            self._commit(row)
        wants = [self._want(row, num_steps) for row in present if self._missing(row.context, num_steps)]
        return Decision(self._message(wants), [], num_steps)

    def apply_extension(self, decision: Decision, reply: LeaseReply) -> bool:
        """Takes the grants in; whether all were given. Rows may have ended meanwhile."""
        self._take(decision, reply)
        return None not in reply.grants.values()

    def flush(self) -> LeaseRequest:
        """Commits and releases without a decision, for an idle loop."""
        return self._message([])

    def note_reply(self, leases: LeaseRequest, reply: LeaseReply) -> None:
        """The ledger has applied `leases`."""
        del self._releases[: len(leases.releases)]
        self.total_blocks = reply.total_blocks
        self.free_blocks = min(reply.total_blocks, reply.free_blocks + self._num_given_back)
        self.stats.prefix_cache_hits = reply.prefix_cache_hits
        self.stats.prefix_cache_misses = reply.prefix_cache_misses
        self.stats.prefix_cache_evictions = reply.prefix_cache_evictions

    # Arrivals and ends.

    def could_admit(self) -> bool:
        """Whether the row at the head of the queue would probably come in at a decision made now."""
        head = next(iter(self.waiting.values()), None)
        if head is None or len(self.running) >= self.limits.max_batch_size:
            return False
        return not self.running or self._fits(head.context, len(self.running))

    def end(self, row: Row) -> None:
        """The one way out of `running` and `waiting`; its full blocks stay as a prefix for others. Not during a run,
        except for a row that the run itself ended."""
        self.waiting.pop(row.key, None)
        if self.running.pop(row.key, None) is not None:
            self._commit(row)
            self._give_back(row)
            self._is_tight = False

    def fail(self, row: Row, error: Exception) -> None:
        self.end(row)
        self.stats.failed += not row.channel.closed
        row.channel.fail(error)

    def restart(self) -> None:
        """The workers have lost the cache: the running rows go back to the front of the queue, in order."""
        for row in reversed(self.running.values()):
            self._releases.append(row.key)
            self._requeue(row)
        self.running.clear()
        self._commits.clear()
        self._is_tight = self._must_preempt = False

    # Helpers, in the order of use.

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _missing(self, context: TextContext, num_steps: int) -> int:
        """Blocks that `context` lacks for a run of `num_steps`. Most often none, so that is found out first."""
        num_blocks = len(context.block_table)
        if context.active_end + num_steps - 1 <= num_blocks * self.page_size:
            return 0
        return max(0, self._blocks(tokens_to_cover(context, num_steps)) - num_blocks)

    def _has_room(self, row: Row) -> bool:
        return len(row.context.tokens) <= len(row.context.block_table) * self.page_size

    def _fits(self, context: TextContext, num_others: int) -> bool:
        """Room for a newcomer without a cached prefix, and one block to grow for each of `num_others`."""
        return self._missing(context, 1) + num_others <= self.free_blocks

    def _fail_oversized(self) -> None:
        for row in list(self.running.values()) + list(self.waiting.values())[:1]:
            num_tokens = len(row.context.tokens)
            if self._blocks(num_tokens) > self.total_blocks:
                self.fail(row, insufficient_blocks(num_tokens, self.page_size, self.total_blocks))

    def _make_room(self) -> None:
        """Preempts the youngest rows until the next token of every other one probably has a block."""
        needed = sum(self._missing(row.context, 1) for row in self.running.values())
        while len(self.running) > 1 and (self._must_preempt or needed > self.free_blocks):
            needed -= self._preempt_youngest()
            self._must_preempt = False

    def _preempt_youngest(self) -> int:
        """Returns how many blocks the preempted row had wanted."""
        _, row = self.running.popitem()
        missing = self._missing(row.context, 1)
        self._commit(row)
        self._give_back(row)
        self._requeue(row)
        self._is_tight = True
        self.stats.preemptions += 1
        return missing

    def _requeue(self, row: Row) -> None:
        row.context.reset()
        self.waiting[row.key] = row
        self.waiting.move_to_end(row.key, last=False)

    def _give_back(self, row: Row) -> None:
        """Shared blocks do not become free by this; the next reply puts the count right."""
        self.free_blocks = min(self.total_blocks, self.free_blocks + len(row.context.block_table))
        self._num_given_back += len(row.context.block_table)
        self._releases.append(row.key)

    def _commit(self, row: Row) -> None:
        hashes = commit_hashes(row.context, self.page_size, row.num_committed)
        if hashes:
            self._commits.append((row.key, row.num_committed, hashes))
            self._known_prefixes.note(hashes)
            row.num_committed += len(hashes)

    def _candidates(self) -> tuple[list[Row], list[Row]]:
        """Waiting rows to let in, strictly in order: those that fit, and at most one after them that may be lucky
        with the prefix cache (not while preempted rows wait for somebody to end)."""
        candidates: list[Row] = []
        if any(row.is_suspect for row in self.running.values()):
            return [], []
        free = self.free_blocks
        in_progress = PrefixesInProgress(self.page_size, self._known_prefixes)
        for row in self.running.values():
            in_progress.add(row)
        budget = self.limits.max_batch_input_tokens - sum(row.pending for row in self.running.values())
        for row in self.waiting.values():
            num_others = len(self.running) + len(candidates)
            if num_others >= self.limits.max_batch_size or (budget <= 0 and num_others):
                break
            if candidates and (row.is_suspect or candidates[-1].is_suspect):
                break
            if self.limits.enable_prefix_caching and in_progress.has_much_of(row):
                continue
            needed = self._missing(row.context, 1)
            if needed + num_others > free:
                return candidates, [] if num_others and (candidates or self._is_tight) else [row]
            candidates.append(row)
            in_progress.add(row)
            free -= needed
            budget -= self._cost(row)
        return candidates, []

    def _cost(self, row: Row) -> int:
        """Tokens that a waiting row will probably add to the first step."""
        if not self.limits.enable_prefix_caching:
            return row.pending
        hashes = lookup_hashes(row.context, self.page_size)
        return row.pending - self._known_prefixes.num_leading(hashes) * self.page_size

    def _num_steps(self, candidates: list[Row]) -> int:
        """1 while somebody's prompt is left over for the next step; else the longest run whose blocks are free."""
        rows = [*self.running.values(), *candidates]
        if sum(row.pending for row in rows) > self.limits.max_batch_input_tokens:
            return 1
        num_steps = self.limits.max_num_steps
        while num_steps > 1 and sum(self._missing(row.context, num_steps) for row in rows) > self.free_blocks:
            num_steps //= 2
        return num_steps

    def _want(self, row: Row, num_steps: int) -> LeaseWant:
        is_new = row.key in self.waiting
        hashes = lookup_hashes(row.context, self.page_size) if is_new else None
        return LeaseWant(row.key, tokens_to_cover(row.context, num_steps), hashes)

    def _message(self, wants: list[LeaseWant]) -> LeaseRequest:
        commits, self._commits = self._commits, []
        self._num_given_back = 0
        return LeaseRequest(commits, list(self._releases), wants)

    def _take(self, decision: Decision, reply: LeaseReply) -> None:
        """Gives the running rows their blocks."""
        self.note_reply(decision.leases, reply)
        for want in decision.leases.wants:
            grant = reply.grants[want.request_id]
            row = self.running.get(want.request_id)
            if row is not None and grant is not None:
                _append_blocks(row.context, grant)

    def _admit(self, candidates: list[Row], reply: LeaseReply) -> None:
        """Moves granted candidates to `running`. A grant behind a refusal is given back: nobody is overtaken."""
        is_open = True
        for row in candidates:
            grant = reply.grants[row.key]
            if grant is None:
                is_open = is_open and row.is_cancelled
            elif is_open and self.waiting.get(row.key) is row:
                del self.waiting[row.key]
                self.running[row.key] = row
                self._first_grant(row, grant)
            else:
                self._releases.append(row.key)

    def _first_grant(self, row: Row, grant: LeaseGrant) -> None:
        context = row.context
        context.processed_length = grant.cached_tokens
        row.num_committed = grant.cached_tokens // self.page_size
        self._known_prefixes.note(row.context.block_hashes[: row.num_committed])
        _append_blocks(context, grant)
        if not row.was_admitted:
            row.was_admitted = True
            context.cached_prefix_length = grant.cached_tokens
            self.stats.prompt_tokens += context.tokens.prompt_length
            self.stats.prefix_hit_tokens += grant.cached_tokens

    def _assemble(self) -> list[Row]:
        """Decode rows, then prompts in order while the token budget lasts."""
        ready = [row for row in self.running.values() if self._has_room(row) and not row.is_cancelled]
        ready = [row for row in ready if row.is_suspect][:1] or ready
        rows = [row for row in ready if row.pending == 1]
        budget = self.limits.max_batch_input_tokens - len(rows)
        is_first = True
        for row in ready:
            if row.pending == 1:
                continue
            if self.limits.enable_chunked_prefill:
                take = min(row.pending, budget)
            else:
                take = row.pending if is_first or row.pending <= budget else 0
            if take <= 0:
                break
            row.context.chunk(take)
            rows.append(row)
            budget -= take
            is_first = False
        return rows

    def _common_steps(self, rows: list[Row], wanted: int) -> int:
        """Steps that every row's lease allows; 1 when somebody else could use the next step."""
        is_left_over = any(row.context.prompt_in_chunks for row in rows) or len(rows) < len(self.running)
        if is_left_over or self.could_admit():
            return 1
        for row in rows:
            context = row.context
            if self._missing(context, wanted):
                wanted = len(context.block_table) * self.page_size - context.active_end + 1
        return wanted

    def _unstick(self, decision: Decision) -> None:
        """Nobody can run. With one row left, or none and a refused candidate, no preemption would help: it fails."""
        if len(self.running) > 1:
            return
        for row in [*self.running.values(), *decision.candidates][:1]:
            if not row.is_cancelled:
                self.fail(row, _blocks_held_elsewhere(self.free_blocks, self.total_blocks))


def _append_blocks(context: TextContext, grant: LeaseGrant) -> None:
    if len(grant.block_ids):
        context.block_table = np.concatenate([context.block_table, grant.block_ids])


def _blocks_held_elsewhere(free_blocks: int, total_blocks: int) -> InsufficientBlocksError:
    return InsufficientBlocksError(
        f"Only {free_blocks} of {total_blocks} KV cache blocks are free, and no other request of this loop holds any: "
        f"somebody else does. Release what was claimed from this cache by hand, or send the request again later."
    )
