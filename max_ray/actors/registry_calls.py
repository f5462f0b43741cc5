"""Calls to the registry. It may be dead, starting, stopped or slow meanwhile.

A dead one is restarted by Ray, and a new one reads back who has what, so a call is simply made again. One that is
silent while an order waits is ended for that: everything it knows can be read back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from max_ray.actors.messages import NAMESPACE, REGISTRY_NAME, ActorHandle
from max_ray.actors.priority import ORDINARY_PRIORITY
from max_ray.actors.ray_errors import DEATHS
from max_ray.actors.registry import RegistryActor
from max_ray.errors import MaxRayError, WorkerGroupError
from max_ray.log import get_logger

_LOG = get_logger(__name__)
_PATIENCE_S = 120.0
"""How long a registry may take to come up, on however busy a machine."""
_PAUSE_S = 0.25
_PING_EVERY_S = 5.0
_SILENT_FOR_S = 30.0
_remote: Any = ray.remote
Call = Callable[[ActorHandle], Any]
"""From the registry's handle to the Ray call's reference."""


def get_registry() -> ActorHandle:
    """The cluster's registry; started when there is none. Ray restarts it when it crashes. Asks Ray's GCS: blocks."""
    return (
        _remote(RegistryActor)
        .options(
            name=REGISTRY_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            runtime_env={"env_vars": ORDINARY_PRIORITY},
            max_concurrency=1000,
        )
        .remote()
    )


async def ask_registry(call: Call, limit_s: float) -> Any:
    """The answer to a question, asked once. Raises the registry's own typed errors as such, WorkerGroupError when it
    does not answer within `limit_s` seconds or is dead."""
    try:
        async with asyncio.timeout(limit_s):
            return await _answer(call(await asyncio.to_thread(get_registry)))
    except TimeoutError:
        raise WorkerGroupError(f"The registry does not answer within {limit_s:.0f} s.") from None
    except DEATHS as error:
        raise WorkerGroupError(f"The registry does not answer ({type(error).__name__}).") from error


async def known_snapshots(apps: Sequence[str], limit_s: float) -> dict[str, dict[str, bytes]]:
    """The replicas' latest metrics snapshots, by application and owner. No registry is started for that.

    Raises WorkerGroupError when the registry does not answer within `limit_s` seconds or is dead.
    """
    try:
        async with asyncio.timeout(limit_s):
            registry: ActorHandle = await asyncio.to_thread(ray.get_actor, REGISTRY_NAME, NAMESPACE)
            found: dict[str, dict[str, bytes]] = await _answer(registry.snapshots.remote(list(apps)))
            return found
    except ValueError:  # no registry, so no group
        return {}
    except TimeoutError:
        raise WorkerGroupError(f"The registry does not answer within {limit_s:.0f} s.") from None
    except DEATHS as error:
        raise WorkerGroupError(f"The registry does not answer ({type(error).__name__}).") from error


async def order_from_registry(call: Call) -> Any:
    """The answer to an order, which may take minutes: made again when the registry dies meanwhile.

    Raises the registry's own typed errors as such, WorkerGroupError when no registry comes up.
    """
    dead_since = time.monotonic()
    while True:
        asked_at = time.monotonic()
        try:
            return await _watched(await asyncio.to_thread(get_registry), call)
        except DEATHS as error:
            if time.monotonic() - asked_at > _PING_EVERY_S:
                dead_since = time.monotonic()  # it was there meanwhile
            elif time.monotonic() - dead_since > _PATIENCE_S:
                raise WorkerGroupError("The registry actor does not come up: look into Ray's logs.") from error
            _LOG.warning("the registry does not answer (%s); trying again", type(error).__name__)
            await asyncio.sleep(_PAUSE_S)


async def _watched(registry: ActorHandle, call: Call) -> Any:
    """The answer. A registry that does not answer pings meanwhile is ended, for Ray to restart."""
    answer = asyncio.ensure_future(_answer(call(registry)))
    heard_at = time.monotonic()
    try:
        while not (await asyncio.wait([answer], timeout=_PING_EVERY_S))[0]:
            if await _answers_ping(registry):
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > _SILENT_FOR_S:
                _LOG.error("the registry has been silent for %.0f s: it is restarted", _SILENT_FOR_S)
                ray.kill(registry, no_restart=False)
                heard_at = time.monotonic()
        return await answer
    finally:
        answer.cancel()


async def _answers_ping(registry: ActorHandle) -> bool:
    """A dead one counts as answering: the call itself tells."""
    try:
        async with asyncio.timeout(_PING_EVERY_S):
            await _answer(registry.ping.remote())
    except TimeoutError:
        return False
    except DEATHS:
        return True
    return True


async def _answer(reference: Any) -> Any:
    try:
        return await reference
    except RayTaskError as error:
        if isinstance(error.cause, MaxRayError):
            raise error.cause from None
        raise
