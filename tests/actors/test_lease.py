"""The lease alone, without Ray."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from max_ray.actors import lease as lease_module
from max_ray.actors.lease import Lease, watch
from max_ray.actors.ray_errors import typed
from max_ray.errors import StaleLeaseError
from tests.actors.helpers import make_spec


def make_lease(grace_s: float = 0.2, start_timeout_s: float = 60.0) -> Lease:
    return Lease(epoch=3, owner_id="a", grace_s=grace_s, start_timeout_s=start_timeout_s)


def test_older_epochs_are_refused_and_newer_owners_kept() -> None:
    lease = make_lease()
    lease.check(3)
    with pytest.raises(StaleLeaseError, match="epoch 3, the call has 2"):
        lease.check(2)
    lease.pass_to(5, "b")
    assert (lease.epoch, lease.owner_id) == (5, "b")
    with pytest.raises(StaleLeaseError):
        lease.check(3)
    with pytest.raises(StaleLeaseError):
        lease.pass_to(4, "c")
    assert lease.owner_id == "b"


def test_the_owner_renews_whatever_its_epoch_is_and_nobody_else() -> None:
    """A rebuild for the same owner raises the epoch with the members first."""
    lease = make_lease()
    lease.pass_to(4, "a")
    lease.renew("a")
    with pytest.raises(StaleLeaseError, match="passed to another replica"):
        lease.renew("b")
    lease.pass_to(5, "b")
    with pytest.raises(StaleLeaseError, match="passed to another replica"):
        lease.renew("a")


def test_a_loading_member_has_the_start_timeout_and_a_renewed_one_the_grace() -> None:
    lease = make_lease()
    time.sleep(0.3)
    assert not lease.is_expired
    lease.renew("a")
    assert not lease.is_expired
    time.sleep(0.3)
    assert lease.is_expired
    lease.renew("a")
    assert not lease.is_expired


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a watch has done."""
    done: list[str] = []
    monkeypatch.setattr(lease_module.os, "_exit", lambda code: done.append(f"exit {code}"))
    monkeypatch.setattr(lease_module, "_TICK_S", 0.02)
    return done


def test_the_watch_ends_the_group_and_then_the_process(ends: list[str]) -> None:
    lease = make_lease()
    lease.renew("a")
    thread = watch(lease, lambda: ends.append("end"), what="member")
    for _ in range(5):
        time.sleep(0.1)
        lease.renew("a")
    assert ends == []
    thread.join(5)
    assert ends == ["end", "exit 0"]


def test_a_process_that_was_stopped_takes_in_the_renewals_that_wait(
    ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes up with a lease that has run out by the clock."""
    lease = make_lease(grace_s=5.0)
    lease.renew("a")
    thread = watch(lease, lambda: ends.append("end"), what="member")
    now = time.monotonic
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now() + 90)
    time.sleep(0.03)
    lease.renew("a")
    time.sleep(0.3)
    assert ends == []
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now() + 180)
    thread.join(5)
    assert ends == ["end", "exit 0"]


def test_a_group_can_serve_another_order_only_when_all_that_matters_is_equal(tiny_llama: Path) -> None:
    spec = make_spec(tiny_llama, "app")
    assert spec.fingerprint == make_spec(tiny_llama, "app").fingerprint
    assert spec.fingerprint != make_spec(tiny_llama, "app", size=2).fingerprint


def test_errors_of_ray_become_ours() -> None:
    import ray.exceptions as raised

    stale = raised.RayTaskError("f", "traceback", StaleLeaseError("gone"))
    assert isinstance(typed(stale), StaleLeaseError)
    broken = raised.RayTaskError("f", "traceback", ZeroDivisionError("1/0"))
    assert "ZeroDivisionError" in str(typed(broken))
    assert "died" in str(typed(raised.ActorDiedError()))
