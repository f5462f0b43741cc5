"""The phases of a start (resolve, plan, place, load, compile, warm), timed in the log of the process that runs each,
and in a table that travels with the worker group to the metrics page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from max_ray.log import get_logger

_LOG = get_logger(__name__)


@contextmanager
def phase(name: str, detail: str = "", durations: dict[str, float] | None = None) -> Iterator[None]:
    """Logs how long the block took, once it ends without an error; in seconds also as `durations[name]`."""
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    if durations is not None:
        durations[name] = seconds
    _LOG.info("startup: %s took %.2f s%s", name, seconds, f" ({detail})" if detail else "")
