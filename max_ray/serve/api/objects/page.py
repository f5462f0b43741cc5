"""A page of a list, as OpenAI's routes answer with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar

from typing_extensions import TypedDict

ItemT = TypeVar("ItemT", bound=Mapping[str, Any])


class Page(TypedDict, Generic[ItemT]):
    """A page. The next one is asked for with `after`: the id of the last item."""

    object: Literal["list"]
    data: list[ItemT]
    first_id: str | None
    last_id: str | None
    has_more: bool
