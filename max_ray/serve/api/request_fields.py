"""What a request's fields may be beyond those of its model: null, neutral values, and names that mean another field.

A request is judged by what it asks for. `null` means "not given" at every level. A field of the OpenAI API or of
another server that is not honoured here passes with the values that ask for nothing, and is a 400 with any other; no
field is accepted and ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from max_ray.errors import nearest, quoted
from max_ray.serve.api.aliases import Alias

MAX_PROBLEMS = 3
FIELD_ERROR = "field"


@dataclass(frozen=True)
class Neutral:
    """A field that is not honoured. It passes where `passes` says that it asks for nothing, and as null.

    values: what passes, in words; empty where only null does. is_foreign: not of the OpenAI API. instead: what to use.
    schema: what passes, as a JSON schema.
    """

    passes: Callable[[Any, Mapping[str, Any]], bool]
    values: str = ""
    is_foreign: bool = False
    instead: str = ""
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "null"}, hash=False)

    def refusal(self, place: str) -> str:
        """The sentences for a value that asks for something."""
        instead = f" {self.instead}" if self.instead else ""
        if self.is_foreign:
            only = f"only as {self.values}, which asks for nothing" if self.values else "only as null"
            return f"Unknown field '{place}': it is known from other servers, and passes here {only}.{instead}"
        only = f", except as {self.values}, which asks for nothing" if self.values else ""
        return f"The field '{place}' is not supported by this server{only}. Leave it out.{instead}"


def only(*values: Any, instead: str = "") -> Neutral:
    """A field of the OpenAI API that passes with these values; without any, as null alone."""
    return Neutral(
        lambda given, _: any(_is_same(given, value) for value in values),
        " or ".join(json.dumps(value) for value in values),
        instead=instead,
        schema={"enum": [*values, None]},
    )


def foreign(*values: Any, instead: str = "") -> Neutral:
    """The same for a field of another server."""
    neutral = only(*values, instead=instead)
    return replace(neutral, is_foreign=True)


def foreign_number() -> Neutral:
    """A number that shapes something which is refused unless it is off: any will do."""
    return Neutral(
        lambda given, _: isinstance(given, int | float) and not isinstance(given, bool),
        "a number",
        is_foreign=True,
        schema={"type": ["number", "null"]},
    )


def _is_same(given: Any, value: Any) -> bool:
    """Equal, and not a boolean for a number."""
    return isinstance(given, bool) == isinstance(value, bool) and bool(given == value)


def ranged(**keywords: float) -> Any:
    """An optional number whose range is checked where it is used; these keywords tell it in `/openapi.json`."""
    return Field(default=None, json_schema_extra=dict(keywords))


@dataclass(frozen=True)
class FieldProblem:
    """What is wrong with one field: the sentence of it, once its place in the request is known."""

    name: str
    sentence: Callable[[str], str]


class StrictModel(BaseModel):
    """Base of all requests and their parts: strict types, no unknown field, null as "not given".

    NEUTRAL: fields that pass with some values. INSTEAD: the sentence for an unknown name that has one. ALIASES: other
    names of fields.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {}
    INSTEAD: ClassVar[Mapping[str, str]] = {}
    ALIASES: ClassVar[Mapping[str, Alias]] = {}
    _known: ClassVar[Set[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls._known = {field.alias or name for name, field in cls.model_fields.items()}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if isinstance(data, BaseModel) and not isinstance(data, cls):
            data = data.model_dump()  # such as a message of the openai package
        if not isinstance(data, dict):
            return data
        if not cls.ALIASES.keys().isdisjoint(data):
            data = cls._own_names(data)
        if cls._known >= data.keys() and None not in data.values():
            return cls._completed(data)
        problems = (problem for name in data if name not in cls._known for problem in cls._problems(name, data))
        raise_problems(list(islice(problems, MAX_PROBLEMS)))
        given = {name: value for name, value in data.items() if name in cls._known and value is not None}
        return cls._completed(given)

    @classmethod
    def _own_names(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The fields without aliases. `raise_problems` for an alias that contradicts the field itself."""
        named = {name: value for name, value in data.items() if name not in cls.ALIASES}
        problems = []
        for name in cls.ALIASES.keys() & data.keys():
            value, alias = data[name], cls.ALIASES[name]
            if value is None:
                continue
            if not alias.takes(value):
                problems.append(FieldProblem(name, _wrong_kind(alias)))
                continue
            for own, meant in alias.fields(value).items():
                if named.get(own) is None:
                    named[own] = meant
                elif not _is_same(named[own], meant):
                    problems.append(FieldProblem(name, _contradiction(own)))
        raise_problems(problems[:MAX_PROBLEMS])
        return named

    @classmethod
    def _completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The fields that are given, with what follows from them. `raise_problems` where they cannot be."""
        return given

    @classmethod
    def _problems(cls, name: str, data: Mapping[str, Any]) -> Iterable[FieldProblem]:
        """Of a field that the model does not have: none where it asks for nothing."""
        neutral, value = cls.NEUTRAL.get(name), data[name]
        if neutral is None:
            hint = f" {cls.INSTEAD[name]}" if name in cls.INSTEAD else nearest(str(name), cls._known)
            yield FieldProblem(str(name), lambda place: f"Unknown field '{place}'.{hint}")
        elif value is not None and not neutral.passes(value, data):
            yield FieldProblem(name, neutral.refusal)


class ApiRequest(StrictModel):
    """Base of what an HTTP body becomes, of any dialect."""

    def refuse_hopeless(self, max_length: int) -> None:
        """Raises PromptTooLongError for what cannot fit a model of `max_length` tokens however it is encoded."""
        raise NotImplementedError


def _wrong_kind(alias: Alias) -> Callable[[str], str]:
    return lambda place: f"The field '{place}' is not valid: it must be {alias.values}."


def _contradiction(own: str) -> Callable[[str], str]:
    return lambda place: f"The fields '{place}' and '{own}' mean the same, and have different values: give one of them."


def raise_problems(problems: list[FieldProblem]) -> None:
    """Raises pydantic's error for these, if there are any: `problems` in its context."""
    if problems:
        named = [FieldProblem(quoted(problem.name)[1:-1], problem.sentence) for problem in problems]
        message = " ".join(problem.sentence(problem.name) for problem in named)
        raise PydanticCustomError(FIELD_ERROR, "{message}", {"message": message, "problems": named})
