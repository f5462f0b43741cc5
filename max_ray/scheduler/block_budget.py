"""BlockBudget: the scheduler's own account of the KV manager's blocks, kept between two exchanges with it.

The KV manager may live in another process, and a decision asks it once. Until the reply comes, decisions are made from
this account: how many blocks are free, which prefixes are cached, and what the next message has to report.
"""

from __future__ import annotations

import numpy as np

from max_ray.interfaces import BlockGrant, BlockRequest, CacheReply, CacheUpdate, RequestID, TextContext
from max_ray.kv_cache import commit_hashes, lookup_hashes, tokens_to_cover
from max_ray.scheduler.prefixes import KnownPrefixes
from max_ray.scheduler.stats import SchedulerStats


class BlockBudget:
    """Free blocks, known prefixes and pending messages.

    Request ids become strings here, where messages to the KV manager are made and read.

    Attributes:
        page_size: Tokens of one block.
        num_blocks: Blocks of the cache.
        num_free_blocks: Blocks that no request holds. An estimate: a shared block does not become free when one of
            its requests ends. The next reply corrects it.
        known_prefixes: Hashes of blocks that are cached.
    """

    def __init__(self, page_size: int, num_blocks: int, stats: SchedulerStats) -> None:
        self._stats = stats
        self._releases: list[str] = []
        self._commits: list[tuple[str, int, list[bytes]]] = []
        self._num_committed: dict[RequestID, int] = {}
        self.reset(page_size, num_blocks)

    def reset(self, page_size: int, num_blocks: int) -> None:
        """Starts a new account, for an empty KV manager. No request may hold blocks."""
        assert not self._num_committed, "a request holds blocks of another KV manager"
        self.page_size = page_size
        self.num_blocks = num_blocks
        self.num_free_blocks = num_blocks
        self._num_given_back = 0  # blocks, since the last message
        self.known_prefixes = KnownPrefixes(num_blocks)

    # Questions.

    @property
    def has_releases(self) -> bool:
        """Whether the KV manager has not heard yet of requests that gave their blocks back."""
        return bool(self._releases)

    def num_missing(self, context: TextContext, num_steps: int) -> int:
        """Blocks that a request lacks for a run that gives it up to `num_steps` tokens. Zero most often, so that is
        checked first."""
        num_blocks = len(context.block_table)
        if context.active_end + num_steps - 1 <= num_blocks * self.page_size:
            return 0
        return max(0, -(-tokens_to_cover(context, num_steps) // self.page_size) - num_blocks)

    def has_room(self, context: TextContext) -> bool:
        """Whether the blocks of a request cover all its known tokens."""
        return len(context.tokens) <= len(context.block_table) * self.page_size

    def exceeds_cache(self, num_tokens: int) -> bool:
        """Whether even the empty cache is too small for so many tokens."""
        return num_tokens > self.num_blocks * self.page_size

    # What requests hold.

    def first_grant(self, context: TextContext, grant: BlockGrant) -> None:
        """Takes in the first blocks of a request; the cached ones among them need not be computed."""
        num_cached_blocks = grant.cached_tokens // self.page_size
        context.processed_length = grant.cached_tokens
        self._num_committed[context.request_id] = num_cached_blocks
        self.known_prefixes.note(context.block_hashes[:num_cached_blocks])
        self.grant(context, grant)

    def grant(self, context: TextContext, grant: BlockGrant) -> None:
        """Takes in further blocks of a request."""
        if len(grant.block_ids):
            context.block_table = np.concatenate([context.block_table, grant.block_ids])

    def commit(self, context: TextContext) -> None:
        """Offers the blocks that became full as a prefix to other requests."""
        first = self._num_committed[context.request_id]
        hashes = commit_hashes(context, self.page_size, first)
        if hashes:
            self._commits.append((context.request_id.value, first, hashes))
            self.known_prefixes.note(hashes)
            self._num_committed[context.request_id] = first + len(hashes)

    def give_back(self, context: TextContext) -> None:
        """Gives back all blocks of a request; the full ones stay cached."""
        self.commit(context)
        del self._num_committed[context.request_id]
        self.num_free_blocks = min(self.num_blocks, self.num_free_blocks + len(context.block_table))
        self._num_given_back += len(context.block_table)
        self._releases.append(context.request_id.value)

    def decline(self, context: TextContext) -> None:
        """Gives back a grant that was not taken in."""
        self._releases.append(context.request_id.value)

    def lose_all(self) -> None:
        """The workers lost the cache: no request holds blocks, and nothing is offered as a prefix."""
        self._releases += [request_id.value for request_id in self._num_committed]
        self._num_committed.clear()
        self._commits.clear()

    # Messages.

    def block_request(self, context: TextContext, num_steps: int, *, is_new: bool) -> BlockRequest:
        """The wish for blocks that cover a run of `num_steps`; of a new request, also for its cached prefix."""
        hashes = lookup_hashes(context, self.page_size) if is_new else None
        return BlockRequest(context.request_id.value, tokens_to_cover(context, num_steps), hashes)

    def take_update(self, block_requests: list[BlockRequest]) -> CacheUpdate:
        """The message to the KV manager: pending commits and releases, and `block_requests`."""
        commits, self._commits = self._commits, []
        self._num_given_back = 0
        return CacheUpdate(commits, list(self._releases), block_requests)

    def apply_reply(self, update: CacheUpdate, reply: CacheReply) -> list[BlockGrant | None]:
        """Corrects the account: the KV manager applied `update`. Returns a grant, or None, for each of its requests."""
        del self._releases[: len(update.releases)]
        self.num_blocks = reply.num_blocks
        self.num_free_blocks = min(reply.num_blocks, reply.num_free_blocks + self._num_given_back)
        self._stats.prefix_cache_hits = reply.prefix_cache_hits
        self._stats.prefix_cache_misses = reply.prefix_cache_misses
        self._stats.prefix_cache_evictions = reply.prefix_cache_evictions
        return [reply.grants[wanted.request_id] for wanted in update.requests]
