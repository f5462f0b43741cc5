"""Which replicas each model has, and which of them the next request goes to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from time import monotonic

from max_ray.errors import WorkerGroupError
from max_ray.serve.api.front.served_model import ServedModel

Wake = Callable[[str], Awaitable[str]]
"""From a model's name to the URL of a replica of it, which is started for a model without one."""
_SUSPECT_S = 5.0
"""A replica that could not be reached is passed over for so long."""
_FRESH_S = 5.0
"""A replica that a request has woken is kept for so long without a report of it."""


@dataclass
class Replica:
    """One replica of a model.

    Args:
        url: Of its HTTP server.
        is_healthy: Whether its workers answer.
        num_open: Requests that this front has under way there.
        known_at: When it was last heard of, in monotonic seconds.
        suspect_until: Until then it is passed over, in monotonic seconds.
        turn: When it was chosen last; a running number.
    """

    url: str
    is_healthy: bool = True
    num_open: int = 0
    known_at: float = 0.0
    suspect_until: float = 0.0
    turn: int = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Counts a request."""
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


class ReplicaTable:
    """The replicas of all models, by name.

    Args:
        wake: Starts a replica of a model that has none.
    """

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self._replicas: dict[str, dict[str, Replica]] = {}
        self._waking: dict[str, asyncio.Task[str]] = {}
        self._turns = count(1)

    def update(self, model: str, reported: Mapping[str, bool]) -> None:
        """Takes over what is known of a model now.

        Args:
            model: Its name.
            reported: Whether a replica is well, by its URL.
        """
        known = self._replicas.setdefault(model, {})
        now = monotonic()
        for url, is_healthy in reported.items():
            replica = known.setdefault(url, Replica(url))
            replica.is_healthy, replica.known_at = is_healthy, now
        for url in [url for url, one in known.items() if url not in reported and now - one.known_at > _FRESH_S]:
            del known[url]

    def replicas(self, model: str) -> list[Replica]:
        """Those of a model."""
        return list(self._replicas.get(model, {}).values())

    def is_waking(self, model: str) -> bool:
        """Whether requests wait for a first replica."""
        return model in self._waking

    def choose(self, model: str, tried: Collection[str] = ()) -> Replica | None:
        """The replica with the fewest requests of this front; of equals the one that waited longest for its turn.

        Args:
            model: Its name.
            tried: URLs that do not come into question.

        Returns:
            A healthy one where there is one; None where the model has none that can be reached.
        """
        now = monotonic()
        found = [one for one in self.replicas(model) if one.url not in tried and one.suspect_until <= now]
        if not found:
            return None
        best = min(found, key=lambda one: (not one.is_healthy, one.num_open, one.turn))
        best.turn = next(self._turns)
        return best

    def suspect(self, replica: Replica) -> None:
        """Passes over a replica for a while: it could not be reached."""
        replica.suspect_until = monotonic() + _SUSPECT_S

    async def woken(self, model: ServedModel) -> Replica:
        """A replica of a model that has none, as soon as there is one. All requests wait for the same start.

        Raises:
            WorkerGroupError: None came up in time.
        """
        name = model.name
        task = self._waking.get(name)
        if task is None:
            task = self._waking[name] = asyncio.ensure_future(self._started(model))
            task.add_done_callback(lambda done: self._end_waking(name, done))
        url = await asyncio.shield(task)
        replica = self._replicas.setdefault(name, {}).setdefault(url, Replica(url))
        replica.known_at, replica.suspect_until = monotonic(), 0.0
        return replica

    async def _started(self, model: ServedModel) -> str:
        try:
            async with asyncio.timeout(model.start_timeout_s):
                return await self._wake(model.name)
        except TimeoutError:
            raise WorkerGroupError(
                f"No replica of the model {model.name!r} came up within {model.start_timeout_s:g} s."
            ) from None

    def _end_waking(self, name: str, task: asyncio.Task[str]) -> None:
        self._waking.pop(name, None)
        if not task.cancelled():
            task.exception()  # those who waited have it; without any it is no fault
