"""Which prefixes are cached, and which are being computed, as the scheduler knows without asking the KV manager.

Requests that arrive together often share a prefix. All but one of them wait until it is computed and then find it in
the prefix cache, instead of computing it side by side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import takewhile

from max_ray.kv_cache import lookup_hashes
from max_ray.scheduler.scheduled_request import ScheduledRequest

WORTH_WAITING_TOKENS = 64
"""A shorter shared prefix is computed again: to wait costs a step, in which the model reads all its weights."""


class KnownPrefixes:
    """Hashes of blocks that are cached, so far as the messages to and from the KV manager tell.

    The KV manager may have evicted some since. A request then computes them again, without waiting.

    Args:
        capacity: Hashes to keep; the oldest are forgotten.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def note(self, hashes: Iterable[bytes]) -> None:
        """These blocks are cached now."""
        for key in hashes:
            self._hashes[key] = None
            self._hashes.move_to_end(key)
        while len(self._hashes) > self._capacity:
            self._hashes.popitem(last=False)

    def num_leading(self, hashes: Iterable[bytes]) -> int:
        """Length of the longest cached prefix, in blocks."""
        return sum(1 for _ in takewhile(self._hashes.__contains__, hashes))

    def missing(self, hashes: Iterable[bytes]) -> list[bytes]:
        """Hashes of the blocks that must be computed."""
        return [key for key in hashes if key not in self._hashes]


class PrefixesInProgress:
    """Blocks of prompts that requests are computing; made for one decision.

    Args:
        page_size: Tokens of one block.
        known: Blocks that are cached already.
        running: Requests that run.
    """

    def __init__(self, page_size: int, known: KnownPrefixes, running: Iterable[ScheduledRequest]) -> None:
        self._page_size = page_size
        self._known = known
        self._computing: set[bytes] = set()
        for request in running:
            self.add(request)

    def add(self, request: ScheduledRequest) -> None:
        """A request that runs, or is about to be admitted."""
        if request.num_pending_tokens > 1:
            hashes = lookup_hashes(request.context, self._page_size)
            first = request.context.processed_length // self._page_size
            self._computing.update(self._known.missing(hashes[first:]))

    def has_much_of(self, request: ScheduledRequest) -> bool:
        """Whether so much of a waiting request's prompt is being computed that it should wait for it."""
        if not self._computing:
            return False
        missing = self._known.missing(lookup_hashes(request.context, self._page_size))
        shared = sum(key in self._computing for key in missing)
        return shared * self._page_size >= WORTH_WAITING_TOKENS
