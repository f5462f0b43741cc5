"""A limit for the wait for a step's tokens.

Collectives inside a replayed CUDA graph are not seen by NCCL's own watchdog: a rank that hangs there leaves the others
waiting for the device for ever. A thread looks at the wait instead, and aborts the group's transport, which ends the
collectives under way.
"""

from __future__ import annotations

import threading
import time
import weakref
from types import TracebackType

from max_ray.distributed.group import TPGroup
from max_ray.errors import WorkerGroupError
from max_ray.log import get_logger

STEP_LIMIT_S = 30.0
_LOOK_S = 0.5
_LOG = get_logger(__name__)


class StepDeadline:
    """A context manager around each wait of one thread. A wait that lasts longer than the limit ends with a
    WorkerGroupError; the group is lost then.

    Args:
        tp: Group whose transport is aborted.
        limit_s: Seconds that a wait may last.
        look_s: Seconds between two looks at the clock.
    """

    def __init__(self, tp: TPGroup, limit_s: float = STEP_LIMIT_S, look_s: float = _LOOK_S) -> None:
        self.expired = False
        self._tp = tp
        self._limit_s = limit_s
        self._look_s = look_s
        self._since: float | None = None
        self._thread = threading.Thread(target=_watch, args=(weakref.ref(self),), name="step-deadline", daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._since = None
        if self.expired:
            raise WorkerGroupError(
                f"Rank {self._tp.rank} of {self._tp.size} waited more than {self._limit_s:g} s for a step: a rank died "
                f"or hangs, and the group must be started anew."
            ) from error

    def look(self) -> float:
        """Aborts the group where a wait has lasted too long; returns the seconds until the next look."""
        since = self._since
        if since is not None and not self.expired and time.monotonic() - since > self._limit_s:
            self.expired = True
            _LOG.error("a step takes longer than %g s: the group's transport is aborted", self._limit_s)
            self._tp.abort()
        return self._look_s


def _watch(reference: weakref.ref[StepDeadline]) -> None:
    """Ends with the deadline's owner."""
    while True:
        deadline = reference()
        if deadline is None or deadline.expired:
            return
        seconds = deadline.look()
        del deadline
        time.sleep(seconds)
