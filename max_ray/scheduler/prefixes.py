"""Which prefixes are cached and which are being computed, as far as a loop knows without asking its ledger.

Requests that come together often begin alike. All but one of them wait the step or the chunks that their common
beginning takes, and then find it in the prefix cache, instead of computing it again side by side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import takewhile

from max_ray.kv_cache import lookup_hashes
from max_ray.scheduler.row import Row

WORTH_WAITING_TOKENS = 64
"""A shorter common beginning is computed again: waiting costs a step, in which a model reads all its weights."""


class KnownPrefixes:
    """Hashes of blocks that were offered to the ledger or came from it. It may have given some up since: then a
    request waits for nobody, and computes them again. At most `capacity` are kept, the latest."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def note(self, hashes: Iterable[bytes]) -> None:
        for key in hashes:
            self._hashes[key] = None
            self._hashes.move_to_end(key)
        while len(self._hashes) > self._capacity:
            self._hashes.popitem(last=False)

    def num_leading(self, hashes: Iterable[bytes]) -> int:
        """How many of the first ones are cached."""
        return sum(1 for _ in takewhile(self._hashes.__contains__, hashes))

    def missing(self, hashes: Iterable[bytes]) -> list[bytes]:
        """Those that must be computed."""
        return [key for key in hashes if key not in self._hashes]


class PrefixesInProgress:
    """The blocks of prompts that somebody is computing. Made anew for each decision."""

    def __init__(self, page_size: int, known: KnownPrefixes) -> None:
        self._page_size = page_size
        self._known = known
        self._computing: set[bytes] = set()

    def add(self, row: Row) -> None:
        """A row that runs, or will in this decision's batch."""
        if row.pending > 1:
            hashes = lookup_hashes(row.context, self._page_size)
            self._computing.update(self._known.missing(hashes[row.context.processed_length // self._page_size :]))

    def has_much_of(self, row: Row) -> bool:
        """Whether it pays for a waiting row to wait on."""
        if not self._computing:
            return False
        missing = self._known.missing(lookup_hashes(row.context, self._page_size))
        shared = sum(key in self._computing for key in missing)
        return shared * self._page_size >= WORTH_WAITING_TOKENS
