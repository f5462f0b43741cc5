"""Names that other servers give to fields of this one: what is asked for under them, in this server's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

UNLIMITED_TOKENS = 2**31 - 1
"""A limit that no model's length reaches."""


_JSON_TYPES = {int: "integer", float: "number", str: "string"}


@dataclass(frozen=True)
class Alias:
    """Another name of a field.

    Args:
        fields: Gives the fields that a value stands for, by this server's names; empty where it asks for nothing.
        kinds: The types of its values.
        values: What it takes, in words.
    """

    fields: Callable[[Any], Mapping[str, Any]]
    kinds: tuple[type, ...]
    values: str

    @property
    def schema(self) -> dict[str, Any]:
        """What it takes, as a JSON schema."""
        return {"type": [*(_JSON_TYPES[kind] for kind in self.kinds), "null"]}

    def takes(self, value: Any) -> bool:
        """Whether a value has one of the types."""
        return isinstance(value, self.kinds) and not isinstance(value, bool)


def _integer(fields: Callable[[int], Mapping[str, Any]]) -> Alias:
    return Alias(fields, (int,), "a whole number")


def _token_limit(value: int) -> Mapping[str, Any]:
    """llama.cpp: -1 goes on without a limit, -2 until the context is full."""
    return {"max_tokens": UNLIMITED_TOKENS if value in (-1, -2) else value}


def _top_log_probabilities(value: int) -> Mapping[str, Any]:
    return {"logprobs": True, "top_logprobs": value} if value else {}


_ANY = {
    "n_predict": _integer(_token_limit),
    "repeat_penalty": Alias(lambda value: {"repetition_penalty": value}, (int, float), "a number"),
    "n_cmpl": _integer(lambda value: {"n": value}),
    "rid": Alias(lambda value: {"request_id": value}, (str,), "a text"),
}
COMPLETION_ALIASES: Mapping[str, Alias] = {
    **_ANY,
    "n_probs": _integer(lambda value: {"logprobs": value} if value else {}),
}
CHAT_ALIASES: Mapping[str, Alias] = {
    **_ANY,
    "n_probs": _integer(_top_log_probabilities),
    "max_thinking_tokens": _integer(lambda value: {"thinking_token_budget": value}),
}
