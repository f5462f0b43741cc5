"""The lease of a group member: who may call it, and its own end without renewals.

Nothing else ends a detached actor: not `serve shutdown`, not a crashed driver. So each member watches its own lease on
a thread of its own, which also works while the registry is dead and while a step holds the main thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from max_ray.errors import StaleLeaseError
from max_ray.log import get_logger

_LOG = get_logger(__name__)
LOOK_S = 0.2
"""How often a member without orders looks whether the lease has passed on."""
_TICK_S = 0.5
_CONFIRM_TICKS = 4
"""A lease is over when so many looks in a row say so: a process that was stopped takes in first what waits for it."""


class Lease:
    """Epoch, owner and age of a member's lease; safe to use from any thread.

    Starts with `start_timeout_s` to live (a member that is still loading is not renewed); the first renewal puts
    it on `grace_s`. Members of a group end their loading at different times, so its end does not.
    """

    def __init__(self, epoch: int, owner_id: str, grace_s: float, start_timeout_s: float) -> None:
        self.epoch = epoch
        self.owner_id = owner_id
        self._grace_s = grace_s
        self._limit_s = start_timeout_s
        self._renewed_at = time.monotonic()
        self._lock = threading.Lock()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._renewed_at

    @property
    def is_expired(self) -> bool:
        return self.age_s > self._limit_s

    def check(self, epoch: int) -> None:
        """Raises StaleLeaseError for a call of an older owner."""
        if epoch < self.epoch:
            raise StaleLeaseError(
                f"This worker group has passed to another replica (lease epoch {self.epoch}, the call has {epoch})."
            )

    def renew(self, owner_id: str) -> None:
        """The owner lives; the epoch does not matter, for it grows when a group is rebuilt for the same owner. Raises
        StaleLeaseError for another than the present owner."""
        if owner_id != self.owner_id:
            raise StaleLeaseError(f"This worker group has passed to another replica (lease epoch {self.epoch}).")
        self._arm()

    def pass_to(self, epoch: int, owner_id: str) -> None:
        """The group has a new owner. Raises StaleLeaseError when a still newer one has it."""
        with self._lock:
            self.check(epoch)
            self.epoch, self.owner_id = epoch, owner_id
        self._arm()

    def _arm(self) -> None:
        self._renewed_at = time.monotonic()
        self._limit_s = self._grace_s


def watch(lease: Lease, end: Callable[[], None], *, what: str) -> threading.Thread:
    """Starts a thread that calls `end` once when the lease has run out, and then ends this process."""

    def run() -> None:
        num_late = 0
        while num_late < _CONFIRM_TICKS:
            time.sleep(_TICK_S)
            num_late = num_late + 1 if lease.is_expired else 0
        _LOG.warning("%s: the lease was not renewed for %.1f s; the group ends itself", what, lease.age_s)
        try:
            end()
        finally:
            os._exit(0)

    thread = threading.Thread(target=run, name="max_ray-lease", daemon=True)
    thread.start()
    return thread
