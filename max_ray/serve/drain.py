"""The end of a replica: open streams go on for as long as Serve waits, and then end with an error event.

Serve tells a replica's code nothing of its end until no request is left, and kills a replica that has not drained in
time. So the replica looks at Serve's own state, and ends its streams itself a moment before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.experimental import internal_kv

from max_ray.log import get_logger

_LOG = get_logger(__name__)
_LOOK_EVERY_S = 0.25
_LAST_SHARE = 0.2
_LAST_S = 2.0
"""Seconds for the last events to reach their clients, and for the replica to end; at most a fifth of the time."""
_ray: Any = ray  # Ray leaves a few of its functions without types


@dataclass(frozen=True)
class DrainState:
    """What Serve says of a replica.

    Args:
        is_draining: Whether the replica is ending.
        limit_s: Seconds that Serve waits for open requests.
    """

    is_draining: bool
    limit_s: float


def drain_state() -> DrainState:
    """Of the replica that this process is."""
    actor_id = ray.get_runtime_context().get_actor_id()
    worker = _ray._private.worker.global_worker
    replica = worker.actors[worker.actor_id]._replica_impl
    assert actor_id == worker.actor_id.hex(), "the only actor of this process"
    return DrainState(replica._shutting_down, replica._deployment_config.graceful_shutdown_timeout_s)


def limit_drain(app_name: str, seconds: float) -> None:
    """Tells all replicas of an application to end their streams sooner, once they drain: the whole server ends."""
    internal_kv._internal_kv_put(_key(app_name), str(seconds).encode())


def forget_drain_limit(app_name: str) -> None:
    """A new server of that name on the same Ray drains as it is configured."""
    internal_kv._internal_kv_del(_key(app_name))


def drain_limit(app_name: str) -> float | None:
    """What `limit_drain` has set. Blocks for a moment."""
    found = internal_kv._internal_kv_get(_key(app_name))
    return None if found is None else float(found)


async def end_streams_in_time(
    end: Callable[[], None],
    app_name: str,
    state: Callable[[], DrainState] = drain_state,
    shorter: Callable[[str], float | None] = drain_limit,
) -> None:
    """Waits until the replica drains and its time is almost over; calls `end` then.

    Args:
        end: Ends all open requests with an error.
        app_name: Name of the application.
        state: Gives the replica's state.
        shorter: Gives a shorter limit than Serve's, or None.
    """
    while not state().is_draining:
        await asyncio.sleep(_LOOK_EVERY_S)
    started, limit_s = time.monotonic(), state().limit_s
    while True:
        given_s = await asyncio.to_thread(shorter, app_name)
        total_s = limit_s if given_s is None else min(limit_s, given_s)
        left_s = started + total_s - min(_LAST_S, _LAST_SHARE * total_s) - time.monotonic()
        if left_s <= 0:
            break
        await asyncio.sleep(min(left_s, _LOOK_EVERY_S))
    _LOG.warning("the replica has drained for %.1f s: its open requests end now", total_s)
    end()


def _key(app_name: str) -> bytes:
    return f"max_ray:drain_limit:{app_name}".encode()
