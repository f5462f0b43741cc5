"""What records the spans of a request that is traced. None, the default, is all that others pay for tracing."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from max_ray.serve.api.generation import Generation


class SpanRecorder(Protocol):
    """Of one HTTP request."""

    def record(self, generation: Generation) -> None:
        """Records the phases of a generation that has ended.

        Args:
            generation: Of this request.
        """


SPANS: ContextVar[SpanRecorder | None] = ContextVar("max_ray_spans", default=None)
"""Of the request that is being answered."""
