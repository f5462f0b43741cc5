"""Quarantine: which request is held responsible for failures of the workers, and when none is."""

from __future__ import annotations

from max_ray.scheduler import ScheduledRequest
from max_ray.scheduler.quarantine import MAX_POISON_REQUESTS, POISON_FAILURES, QUARANTINE_FAILURES, Quarantine
from max_ray.scheduler.recovery import MAX_FAILURES
from tests.scheduler.fakes import make_context


def make_requests(*names: str) -> list[ScheduledRequest]:
    return [ScheduledRequest(make_context(name, range(3)), arrival=0.0) for name in names]


def fail(quarantine: Quarantine, *requests: ScheduledRequest, times: int = 1) -> ScheduledRequest | None:
    """What the last of so many failed runs is attributed to."""
    found = None
    for _ in range(times):
        quarantine.begin_run(list(requests))
        found = quarantine.attribute_failure()
    return found


def test_failures_in_a_batch_and_then_alone() -> None:
    quarantine, (a, b) = Quarantine(), make_requests("a", "b")
    assert fail(quarantine, a, b, times=QUARANTINE_FAILURES - 1) is None
    assert quarantine.first_of([a, b]) is None
    assert fail(quarantine, a, b) is None
    assert quarantine.first_of([a, b]) is a
    assert fail(quarantine, a, times=POISON_FAILURES - QUARANTINE_FAILURES - 1) is None
    assert fail(quarantine, a) is a
    quarantine.release(a)
    assert quarantine.first_of([a, b]) is b


def test_a_request_in_a_batch_is_never_the_cause() -> None:
    quarantine, (a, b) = Quarantine(), make_requests("a", "b")
    assert fail(quarantine, a, b, times=POISON_FAILURES + 1) is None


def test_a_token_clears_a_request() -> None:
    quarantine, (a, b) = Quarantine(), make_requests("a", "b")
    fail(quarantine, a, b, times=QUARANTINE_FAILURES)
    quarantine.note_tokens([a, None])
    assert (quarantine.holds(a), quarantine.holds(b)) == (False, True)
    quarantine.note_tokens([b])
    assert not quarantine.has_failed_runs


def test_a_failure_outside_a_run_is_no_requests() -> None:
    quarantine, (a,) = Quarantine(), make_requests("a")
    quarantine.begin_run([a])
    quarantine.end_run()
    assert quarantine.attribute_failure() is None
    assert not quarantine.has_failed_runs


def test_a_request_that_ended_before_the_failure_is_not_kept() -> None:
    quarantine, (a, b) = Quarantine(), make_requests("a", "b")
    a.outputs.discard()
    assert fail(quarantine, a, b) is None
    quarantine.release(b)
    assert not quarantine.has_failed_runs


def test_consecutive_failures_end_all_and_a_step_breaks_the_row() -> None:
    quarantine, requests = Quarantine(), make_requests("a", "b")
    fail(quarantine, *requests, times=MAX_FAILURES - 1)
    assert not quarantine.must_fail_all
    quarantine.note_step()
    fail(quarantine, *requests, times=MAX_FAILURES - 1)
    assert not quarantine.must_fail_all
    fail(quarantine, *requests)
    assert quarantine.must_fail_all
    quarantine.reset_failures()
    assert not quarantine.must_fail_all


def test_many_poison_requests_are_no_poison() -> None:
    quarantine, requests = Quarantine(), make_requests(*"abcd"[: MAX_POISON_REQUESTS + 1])
    for request in requests:
        assert not quarantine.must_fail_all
        assert fail(quarantine, request, times=POISON_FAILURES) is request
        quarantine.release(request)
    assert quarantine.must_fail_all
