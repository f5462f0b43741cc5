"""LeaseKeeper without Ray: members that answer, die, are silent, or are somebody else's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from max_ray.actors import lease_keeper
from max_ray.actors.lease_keeper import SILENT_ROUNDS, LeaseKeeper
from max_ray.actors.messages import GroupInfo
from max_ray.errors import MaxRayError, StaleLeaseError, WorkerGroupError


class Member:
    """A handle. `error`: what renewals raise. While `silent`, they are not answered."""

    def __init__(self) -> None:
        self.owners: list[str] = []
        self.error: RayError | None = None
        self.silent = threading.Event()
        self.renew = SimpleNamespace(remote=self._renew)

    def _renew(self, owner_id: str) -> Member:
        self.owners.append(owner_id)
        return self


class FakeRay:
    """A call's reference is its member; `wait` takes its time as Ray's does."""

    @staticmethod
    def wait(calls: list[Member], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Member], list[Member]]:
        deadline = time.monotonic() + timeout
        while any(call.silent.is_set() for call in calls) and time.monotonic() < deadline:
            time.sleep(0.001)
        return [call for call in calls if not call.silent.is_set()], [call for call in calls if call.silent.is_set()]

    @staticmethod
    def get(call: Member) -> None:
        if call.error is not None:
            raise call.error


class Kept:
    """A keeper over two workers and a KV manager, and what it has reported."""

    def __init__(self) -> None:
        self.members = [Member() for _ in range(3)]
        self.reports: list[tuple[GroupInfo, MaxRayError]] = []
        self.info = self.new_info(1)
        self.keeper = LeaseKeeper(self.info, "owner", lambda info, error: self.reports.append((info, error)))

    def new_info(self, epoch: int) -> GroupInfo:
        spec: Any = None
        return GroupInfo("group", epoch, tuple(self.members[:2]), self.members[2], 64, spec)

    def until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.002)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    monkeypatch.setattr(lease_keeper, "RENEW_EVERY_S", 0.01)
    monkeypatch.setattr(lease_keeper, "ray", FakeRay)
    found = Kept()
    yield found
    found.keeper.stop()
    found.keeper.join()  # else its next call would meet Ray itself, and start one


def test_a_silent_member_does_not_hold_up_the_others_and_is_reported_once(kept: Kept) -> None:
    silent, *others = kept.members
    kept.until(lambda: all(len(m.owners) > 2 for m in kept.members), "all are renewed")
    silent.silent.set()
    before = [len(m.owners) for m in kept.members]
    kept.until(lambda: kept.reports, "the silent one is reported")
    kept.until(lambda: len(others[0].owners) > before[1] + SILENT_ROUNDS + 5, "the others are renewed all the time")
    assert len(silent.owners) <= before[0] + 1, "one call at a time"
    assert [(info, type(error)) for info, error in kept.reports] == [(kept.info, WorkerGroupError)]
    assert kept.keeper.silence_s > 0.1


def test_a_dead_member_is_reported_in_the_next_round(kept: Kept) -> None:
    kept.members[2].error = ActorDiedError()
    kept.until(lambda: kept.reports, "it is reported")
    assert [type(error) for _, error in kept.reports] == [WorkerGroupError]
    calls = len(kept.members[2].owners)
    time.sleep(0.1)
    assert (len(kept.reports), len(kept.members[2].owners)) == (1, calls), "once, and it is not called again"


def test_a_connection_that_breaks_is_not_a_death(kept: Kept) -> None:
    kept.members[0].error = ActorUnavailableError("a connection broke", b"0" * 16)
    calls = len(kept.members[0].owners)
    kept.until(lambda: len(kept.members[0].owners) > calls + 5, "it is called again")
    assert kept.reports == []
    kept.members[0].error = None
    kept.until(lambda: kept.keeper.silence_s < 0.1, "it has answered")


def test_a_group_of_another_owner_is_reported_as_such(kept: Kept) -> None:
    kept.members[1].error = RayTaskError("renew", "traceback", StaleLeaseError("passed on"))
    kept.until(lambda: kept.reports, "it is reported")
    assert isinstance(kept.reports[0][1], StaleLeaseError)


def test_a_rebuilt_group_is_looked_at_anew(kept: Kept) -> None:
    kept.members[0].error = ActorDiedError()
    kept.until(lambda: kept.reports, "it is reported")
    kept.members[0] = Member()
    fresh = kept.new_info(2)
    kept.keeper.adopt(fresh)
    kept.until(lambda: len(kept.members[0].owners) > 2, "the new member is renewed")
    assert set(kept.members[0].owners) == {"owner"}
    kept.members[1].error = ActorDiedError()
    kept.until(lambda: len(kept.reports) == 2, "another death")
    assert kept.reports[1][0] is fresh
    kept.keeper.stop()
    time.sleep(0.05)
    calls = len(kept.members[0].owners)
    time.sleep(0.1)
    assert len(kept.members[0].owners) == calls


def test_a_process_that_gets_no_time_reports_nobody(kept: Kept) -> None:
    """It has not heard of anybody, but neither has it asked."""
    kept.until(lambda: all(m.owners for m in kept.members), "all are renewed")
    busy = time.monotonic() + 0.5
    while time.monotonic() < busy:
        sum(range(200_000))
    assert kept.reports == []
