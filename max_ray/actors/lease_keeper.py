"""LeaseKeeper: renews the lease with every member of a group, on a thread and a clock of its own.

No request, registry or model can hold it up: it calls the members directly, each apart from the others, and waits for
none. What it finds out on the way (a member is dead, silent, or owned by another replica) it reports.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from max_ray.actors.messages import ActorHandle, GroupInfo
from max_ray.actors.ray_errors import typed
from max_ray.errors import MaxRayError, WorkerGroupError
from max_ray.log import get_logger

_LOG = get_logger(__name__)
RENEW_EVERY_S = 1.0
SILENT_ROUNDS = 20
"""A member that answers no renewal for so many rounds counts as hung. Rounds, not seconds: when this process itself
gets no time, none pass."""

Report = Callable[[GroupInfo, MaxRayError], None]


@dataclass(slots=True)
class _Member:
    """One member's renewals, one at a time. `failed`: nothing more is expected of it."""

    handle: ActorHandle
    answered_at: float
    call: Any = None
    num_rounds: int = 0
    failed: bool = False


class LeaseKeeper:
    """Made and ended by the owner of a group.

    report: called on the keeper's thread with the group as it was asked and an error: WorkerGroupError for a member
    that is dead or silent, StaleLeaseError when the group is another's; once for each member of each GroupInfo.
    """

    def __init__(self, info: GroupInfo, owner_id: str, report: Report) -> None:
        self._info = info
        self._owner_id = owner_id
        self._report = report
        self._known: GroupInfo | None = None
        self._members: list[_Member] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="max_ray-lease-keeper", daemon=True)
        self._look(info)
        self._thread.start()

    def adopt(self, info: GroupInfo) -> None:
        """Goes on with a rebuilt group, from the next round on."""
        self._info = info

    def stop(self) -> None:
        """No round begins after this; one in progress ends by itself. Idempotent."""
        self._stopped.set()

    def join(self) -> None:
        """Waits for the end of the round in progress, after `stop`.

        A call of Ray's API in a process without Ray starts one: the round must be over before Ray is disconnected.
        """
        self._thread.join()

    @property
    def silence_s(self) -> float:
        """Seconds since the last answer of the member that has been silent longest."""
        members = self._members
        return time.monotonic() - min(member.answered_at for member in members) if members else 0.0

    def _run(self) -> None:
        while not self._stopped.is_set():
            started = time.monotonic()
            self._look(self._info)
            self._round()
            self._stopped.wait(max(0.0, started + RENEW_EVERY_S - time.monotonic()))

    def _look(self, info: GroupInfo) -> None:
        """Members of a new GroupInfo count as having just answered."""
        if info is not self._known:
            handles = [*info.workers, *([] if info.kv_manager is None else [info.kv_manager])]
            self._known, self._members = info, [_Member(handle, time.monotonic()) for handle in handles]

    def _round(self) -> None:
        for member in self._members:
            if member.call is None and not member.failed:
                member.call, member.num_rounds = member.handle.renew.remote(self._owner_id), 0
        calls = [member.call for member in self._members if member.call is not None]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=RENEW_EVERY_S)
        for member in self._members:
            if member.call is not None:
                self._collect(member)

    def _collect(self, member: _Member) -> None:
        if not ray.wait([member.call], timeout=0)[0]:
            member.num_rounds += 1
            if member.num_rounds == SILENT_ROUNDS:
                self._fail(member, WorkerGroupError(f"A member of the group did not answer {SILENT_ROUNDS} times."))
            return
        call, member.call = member.call, None
        try:
            ray.get(call)
        except ActorUnavailableError as error:  # a connection that broke: the next round tells more
            _LOG.warning("a member of the worker group could not be reached: %s", str(error).splitlines()[0])
        except RayError as error:
            self._fail(member, typed(error))
        else:
            member.answered_at = time.monotonic()

    def _fail(self, member: _Member, error: MaxRayError) -> None:
        member.failed = True
        assert self._known is not None, "a member of no group"
        self._report(self._known, error)
