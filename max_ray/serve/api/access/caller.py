"""Caller: the API key behind the request that is being answered, for all code below the middleware."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from max_ray.errors import ForbiddenError
from max_ray.serve.api.access.rate_limits import KeyUsage
from max_ray.serve.api.metrics import PYTHON_HANDLE


@dataclass(frozen=True, slots=True)
class Caller:
    """One API key, without the key.

    Args:
        name: Of the key; "" without keys.
        models: Names of models that it may use; None: all.
        weight: Its share of the server, in proportion to other keys' weights.
        is_admin: Whether it may read what belongs to other keys.
        usage: What it has used; shared by all requests of the key.
    """

    name: str = ""
    models: frozenset[str] | None = None
    weight: float = 1.0
    is_admin: bool = False
    usage: KeyUsage = field(default_factory=KeyUsage)

    def check_model(self, model: str) -> None:
        """Raises ForbiddenError for a model that the key may not use."""
        if not self.may_use(model):
            raise ForbiddenError(f"The API key {self.name!r} may not use the model {model!r}.")

    def may_use(self, model: str) -> bool:
        """Whether the key may use a model."""
        return self.models is None or model in self.models

    def may_read(self, owner: str) -> bool:
        """Whether the key may read what the key of this name has made."""
        return self.is_admin or owner == self.name


ANYONE = Caller()
CALLER: ContextVar[Caller] = ContextVar("max_ray_caller", default=ANYONE)
DEADLINE: ContextVar[float | None] = ContextVar("max_ray_deadline", default=None)
"""When the client gives up, in monotonic seconds."""
ROUTE: ContextVar[str] = ContextVar("max_ray_route", default=PYTHON_HANDLE)
"""The route's template, as the label of metrics."""
