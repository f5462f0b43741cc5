"""Named actors that belong to an application: how they end, and a replica's way to one.

Such an actor is detached, so it ends itself: when the registry has known no worker group of its application for a
minute, and no front has said meanwhile that it is there.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from max_ray.actors.messages import NAMESPACE, REGISTRY_NAME, ActorHandle, RegistryStatus
from max_ray.actors.priority import ORDINARY_PRIORITY
from max_ray.actors.ray_errors import DEATHS
from max_ray.errors import MaxRayError, WorkerGroupError
from max_ray.log import get_logger

_LOG = get_logger(__name__)
LOOK_EVERY_S = 5.0
UNNEEDED_LOOKS = 12
"""So many times in a row there is no group: then the application has ended."""
NEEDED_FOR_S = 30.0
"""After a front has said so. It does every few seconds."""
ANSWER_WITHIN_S = 30.0
_remote: Any = ray.remote


class ApplicationActor:
    """Base of the plain classes.

    Args:
        app: The application whose replicas use the actor.
    """

    def __init__(self, app: str) -> None:
        self._app = app
        self._watch: asyncio.Task[None] | None = None
        self._needed_at = -math.inf

    async def need(self) -> None:
        """Says that the application is there, though it may have no worker group now."""
        self._needed_at = time.monotonic()

    async def begin(self) -> None:
        """To be called before anything else; again is fine."""
        self._watch = self._watch or asyncio.create_task(self._end_with_application())

    async def _end_with_application(self) -> None:
        num_unneeded = 0
        while num_unneeded < UNNEEDED_LOOKS:
            await asyncio.sleep(LOOK_EVERY_S)
            num_unneeded = 0 if await self._is_needed() else num_unneeded + 1
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _is_needed(self) -> bool:
        if time.monotonic() - self._needed_at < NEEDED_FOR_S:
            return True
        try:
            registry: Any = await asyncio.to_thread(ray.get_actor, REGISTRY_NAME, NAMESPACE)
            status: RegistryStatus = await registry.status.remote()
        except (ValueError, RayError):  # there is none, or it is being restarted
            return False
        return any(group.app == self._app or group.app.startswith(group_app(self._app, "")) for group in status.groups)


def group_app(app: str, deployment: str) -> str:
    """The name under which worker groups of one of several models are known.

    Args:
        app: The application.
        deployment: The model's deployment in it.
    """
    return f"{app}.{deployment}"


class ActorClient:
    """A replica's way to an actor, which is started by the first call.

    Args:
        name: Of the actor.
        title: What it is called in an error.
        kind: Its plain class, an ApplicationActor.
        arguments: Of the class.
    """

    def __init__(self, name: str, title: str, kind: Callable[..., ApplicationActor], *arguments: Any) -> None:
        self._name = name
        self._title = title
        self._kind = kind
        self._arguments = arguments
        self._handle: ActorHandle | None = None

    async def need(self) -> None:
        """Keeps the actor, where there is one. Raises WorkerGroupError where it does not answer."""
        try:
            handle: Any = await asyncio.to_thread(ray.get_actor, self._name, NAMESPACE)
        except ValueError:  # nothing has been stored
            return
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await handle.need.remote()
        except (TimeoutError, *DEATHS) as error:
            raise WorkerGroupError(f"{self._title} does not answer ({type(error).__name__}).") from error

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """The answer. An actor that has died is replaced by a new one. Raises WorkerGroupError."""
        for is_last in (False, True):
            try:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    if self._handle is None:
                        self._handle = await self._started()
                    return await getattr(self._handle, method).remote(*arguments)
            except TimeoutError:
                raise WorkerGroupError(f"{self._title} does not answer. Try again.") from None
            except DEATHS as error:
                self._handle = None
                if is_last:
                    raise WorkerGroupError(f"{self._title} has died. Try again.") from error
                _LOG.warning("%s has died (%s): a new one is started", self._title, type(error).__name__)
        raise AssertionError("the second try returns or raises")

    async def _call(self, method: str, *arguments: Any) -> Any:
        """The answer. What the actor raises of ours is raised here as it was there."""
        try:
            return await self._ask(method, *arguments)
        except RayTaskError as error:
            if isinstance(error.cause, MaxRayError):
                raise error.cause from None
            raise

    async def _started(self) -> ActorHandle:
        options = {
            "name": self._name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "runtime_env": {"env_vars": ORDINARY_PRIORITY},
            "max_concurrency": 1000,
        }
        handle: ActorHandle = await asyncio.to_thread(
            lambda: _remote(self._kind).options(**options).remote(*self._arguments)
        )
        await handle.begin.remote()
        return handle
