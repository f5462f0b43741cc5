"""Recovery: brings the workers of a loop back after a failure, however often that takes.

Every way back to healthy workers leads through the loop that uses them, so what the loop says of its health is true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from max_ray.errors import MaxRayError, StaleLeaseError
from max_ray.interfaces import KVCacheClient
from max_ray.log import get_logger

_LOG = get_logger(__name__)

MAX_FAILURES = 4  # attempts in a row for which requests wait
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0

Recover = Callable[[], Awaitable[KVCacheClient | None]]


class Recovery:
    """State of a worker group that is to be brought back.

    recover: brings the workers back and returns the ledger to use from then on (None: the old one, emptied). None:
    failures are final.
    """

    def __init__(self, recover: Recover | None) -> None:
        self.recover = recover
        self.is_needed = False
        self._num_attempts = 0

    async def attempt(self) -> tuple[bool, KVCacheClient | None]:
        """One attempt, after a pause that grows with the failures before it: (whether the workers are back, their
        ledger).

        Raises MaxRayError from the MAX_FAILURES-th failure in a row on: requests need not wait any longer, and the
        next attempt is due all the same. Raises StaleLeaseError when the group is another replica's; then none is due.
        """
        assert self.recover is not None, "a recovery that nobody can make"
        if self._num_attempts:
            await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self._num_attempts - 1)))
        self._num_attempts += 1
        try:
            ledger = await self.recover()
        except StaleLeaseError:
            self._end()
            raise
        except MaxRayError as error:
            _LOG.error("the worker group did not come back (attempt %d): %s", self._num_attempts, error)
            if self._num_attempts >= MAX_FAILURES:
                raise
            return False, None
        self._end()
        return True, ledger

    def _end(self) -> None:
        self.is_needed = False
        self._num_attempts = 0
