"""The models of an application, as the front knows them without asking a replica."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from max_ray.errors import InputError, ModelNotServedError, nearest, quoted
from max_ray.serve.api.access.caller import CALLER
from max_ray.serve.api.api_context import ModelDetails
from max_ray.serve.api.engine import ModelView
from max_ray.serve.api.model_object import model_object
from max_ray.serve.api.ollama.model_objects import listed_model, shown_model


@dataclass(frozen=True)
class ServedModel:
    """One model.

    Args:
        name: The name that lists show.
        aliases: Other names that requests may give.
        max_length: Longest sequence, in tokens.
        takes_images: Whether its chats may hold images.
        min_replicas: Fewest replicas; 0 where it may have none.
        idle_s: Seconds without a request after which the last replica ends, where it may.
        start_timeout_s: Seconds that a request waits for a first replica.
        entry: Its object of `/v1/models`.
        listed: Its object of `/api/tags`.
        shown: Its object of `/api/show`.
        vram_bytes: Bytes of its weights in GPU memory.
    """

    name: str
    aliases: tuple[str, ...] = ()
    max_length: int = 0
    takes_images: bool = False
    min_replicas: int = 1
    idle_s: float = 0.0
    start_timeout_s: float = 600.0
    entry: Mapping[str, Any] = field(default_factory=dict)
    listed: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)
    vram_bytes: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *self.aliases)


def served_model(model: ModelView, details: ModelDetails, **settings: Any) -> ServedModel:
    """What the front tells of a model.

    Args:
        model: The loaded tokenizer, and what follows from the plan.
        details: Of the weights.
        **settings: `min_replicas`, `idle_s` and `start_timeout_s` of `ServedModel`.
    """
    return ServedModel(
        name=model.model_name,
        aliases=model.model_aliases,
        max_length=model.tokenizer.max_length,
        takes_images=model.tokenizer.takes_images,
        entry=model_object(model, 0),
        listed=listed_model(model, details),
        shown=shown_model(model, details),
        vram_bytes=details.size_bytes if details.is_on_gpu else 0,
        **settings,
    )


class ModelTable:
    """Finds a model by the name that a request gives.

    Args:
        models: All of the application, with names and aliases that differ.
    """

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = tuple(models)
        self._by_name = {name: model for model in self._models for name in model.names}
        assert len(self._by_name) == sum(len(model.names) for model in self._models), "names must differ"

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def allowed(self) -> list[ServedModel]:
        """The models that the caller's key may use."""
        return [model for model in self._models if CALLER.get().may_use(model.name)]

    def find(self, name: str | None) -> ServedModel:
        """The model of that name or alias.

        Raises:
            InputError: There is no name.
            ModelNotServedError: No model has the name.
            ForbiddenError: The caller's key may not use it.
        """
        if name is None:
            raise InputError(f"The field 'model' is required: {self._told()}", param="model")
        model = self._by_name.get(name) or self._by_name.get(name.removesuffix(":latest"))
        if model is None:
            allowed = [known for one in self.allowed for known in one.names]
            raise ModelNotServedError(
                f"The model {quoted(name)} is not served here.{nearest(name, allowed)} T{self._told()[1:]}",
                param="model",
            )
        CALLER.get().check_model(model.name)
        return model

    def _told(self) -> str:
        return f"this server serves {', '.join(repr(model.name) for model in self.allowed)}."
