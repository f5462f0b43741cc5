"""Ray's errors as ours: one sentence, and the type that says what to do."""

from __future__ import annotations

from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from max_ray.errors import MaxRayError, StaleLeaseError, WorkerGroupError

DEATHS = (RayActorError, OutOfMemoryError)
"""What calls to a dead actor raise. One that Ray ended for the machine's memory has a type of its own."""


async def outcome(call: Any) -> None:
    """Waits for an actor's call; Ray's errors as ours."""
    await answer(call)


async def answer(call: Any) -> Any:
    """The answer of an actor's call; Ray's errors as ours."""
    try:
        return await call
    except RayError as error:
        raise typed(error) from error


def typed(error: RayError) -> MaxRayError:
    """Ray's error as one of ours."""
    cause: Any = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, StaleLeaseError):
        return StaleLeaseError(str(cause))
    if isinstance(error, DEATHS):
        return WorkerGroupError(f"A worker died: {str(error).splitlines()[0]}")
    if cause is not None:
        return WorkerGroupError(f"A worker failed: {type(cause).__name__}: {cause}")
    return WorkerGroupError(f"The worker group does not answer: {error}")
