"""The phases of a start (resolve, plan, place, load, compile, warm), timed in the log of the process that runs each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from max_ray.log import get_logger

_LOG = get_logger(__name__)


@contextmanager
def phase(name: str, detail: str = "") -> Iterator[None]:
    """Logs how long the block took, once it ends without an error."""
    started = time.monotonic()
    yield
    _LOG.info("startup: %s took %.2f s%s", name, time.monotonic() - started, f" ({detail})" if detail else "")
