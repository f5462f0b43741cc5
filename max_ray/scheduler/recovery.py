"""Recovery: brings the workers of a loop back after a failure, in as many attempts as it takes.

Only the loop that uses the workers recovers them, so its `healthy` is always true to their state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from max_ray.errors import MaxRayError, StaleLeaseError
from max_ray.interfaces import KVCacheClient
from max_ray.log import get_logger

_LOG = get_logger(__name__)

MAX_FAILURES = 4
"""Consecutive failures during which requests keep waiting."""
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0

Recover = Callable[[], Awaitable[KVCacheClient | None]]


class Recovery:
    """State of a recovery.

    Args:
        recover: Brings the workers back and returns the client of an empty KV manager (None: the one before, which it
            has emptied). None: failures are final.

    Attributes:
        is_needed: Whether the workers must be brought back before they are used.
    """

    def __init__(self, recover: Recover | None) -> None:
        self.recover = recover
        self.is_needed = False
        self._num_attempts = 0

    async def attempt(self) -> tuple[bool, KVCacheClient | None]:
        """One attempt, after a pause that grows with the failures before it.

        Returns:
            Whether the workers are back, and the client of their KV manager.

        Raises:
            MaxRayError: The attempt failed, and MAX_FAILURES - 1 or more before it. Requests should not wait any
                longer; another attempt is due all the same.
            StaleLeaseError: The worker group belongs to another replica. No further attempt is due.
        """
        assert self.recover is not None, "recovery was requested, and failures are final"
        if self._num_attempts:
            await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self._num_attempts - 1)))
        self._num_attempts += 1
        try:
            kv_cache = await self.recover()
        except StaleLeaseError:
            self._end()
            raise
        except MaxRayError as error:
            _LOG.error("the worker group did not come back (attempt %d): %s", self._num_attempts, error)
            if self._num_attempts >= MAX_FAILURES:
                raise
            return False, None
        self._end()
        return True, kv_cache

    def _end(self) -> None:
        self.is_needed = False
        self._num_attempts = 0
