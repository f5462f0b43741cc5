"""Every error that a call to a dead actor raises means that it is dead: an actor that Ray ended for memory, too."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayError

from max_ray.actors import registry_calls
from max_ray.actors.groups import _cause_of
from max_ray.actors.ray_errors import typed
from max_ray.errors import WorkerGroupError
from max_ray.serve.response_store import ActorResponseStore

DEATHS = [
    ActorDiedError(),
    ActorUnavailableError("It is being restarted.", b"0" * 16),
    OutOfMemoryError("1 worker was killed.\nTen lines of advice."),
]
each_death = pytest.mark.parametrize("death", DEATHS, ids=lambda death: type(death).__name__)


class Handle:
    """An actor of one method, `find` (or `ping`): it raises, or answers."""

    def __init__(self, error: RayError | None) -> None:
        self._error = error
        self.find = self.ping = self

    async def remote(self, *arguments: Any) -> Any:
        if self._error is not None:
            raise self._error
        return "found"


def store_of(*handles: Handle) -> ActorResponseStore:
    """A store whose actors are these, one after the other."""
    store = ActorResponseStore("app")
    following = iter(handles)

    async def started() -> Any:
        return next(following)

    store._started = started  # type: ignore[method-assign]
    return store


@each_death
async def test_a_dead_store_of_responses_is_replaced(death: RayError) -> None:
    store = store_of(Handle(death), Handle(None))
    assert await store.find("a") == "found"
    assert await store.find("a") == "found"


@each_death
async def test_a_store_that_does_not_come_up_is_no_unknown_error(death: RayError) -> None:
    store = store_of(Handle(death), Handle(death), Handle(None))
    with pytest.raises(WorkerGroupError, match="has died"):
        await store.find("a")
    assert await store.find("a") == "found", "the dead one is forgotten"


@each_death
async def test_a_dead_registry(death: RayError, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = [Handle(death), Handle(None)]
    monkeypatch.setattr(registry_calls, "get_registry", lambda: handles.pop(0))
    monkeypatch.setattr(registry_calls, "_PAUSE_S", 0)
    assert await registry_calls.order_from_registry(lambda registry: registry.find.remote()) == "found"
    monkeypatch.setattr(registry_calls, "get_registry", lambda: Handle(death))
    with pytest.raises(WorkerGroupError, match="does not answer"):
        await registry_calls.ask_registry(lambda registry: registry.find.remote(), 5)
    assert await registry_calls._answers_ping(Handle(death))  # type: ignore[arg-type]


@each_death
def test_a_dead_worker(death: RayError) -> None:
    for error in (typed(death), _cause_of(death)):
        assert isinstance(error, WorkerGroupError)
        assert str(error).startswith("A worker died")
        assert "\n" not in str(error)
