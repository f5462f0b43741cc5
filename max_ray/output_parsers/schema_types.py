"""From the text of an argument to JSON, by the type that the tool's schema names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from max_ray.output_parsers.python_values import LiteralError, python_value

_ANY = frozenset(["string", "number", "integer", "boolean", "null", "object", "array"])
_MAX_DEPTH = 16
_PYTHON_CONSTANTS = {"True": "true", "False": "false", "None": "null"}


def types_of(schema: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows; all where it does not say.

    Args:
        schema: A JSON schema.
        depth: Schemas around this one.
    """
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset([named])
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str))
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    if values:
        return frozenset(_type_of(value) for value in values)
    for word in ("anyOf", "oneOf"):
        options = schema.get(word)
        if isinstance(options, list) and options and depth < _MAX_DEPTH:
            parts = [types_of(option, depth + 1) if isinstance(option, Mapping) else _ANY for option in options]
            return frozenset[str]().union(*parts)
    return _ANY


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a schema allows texts only.

    Args:
        schema: A JSON schema.
    """
    return types_of(schema) == {"string"}


def as_json(text: str, schema: Mapping[str, Any]) -> str:
    """The JSON text of an argument.

    A text that is JSON of an allowed type is that value; Python's constants, lists and dictionaries count too. Anything
    else is a string.

    Args:
        text: The argument as the model wrote it.
        schema: Schema of the parameter; empty where it is not known.
    """
    types, stripped = types_of(schema), text.strip()
    for candidate in (stripped, _PYTHON_CONSTANTS.get(stripped), _from_python(stripped)):
        if candidate is not None and _json_type(candidate) & types - {"string"}:
            return candidate
    return json.dumps(text, ensure_ascii=False)


def _json_type(text: str) -> frozenset[str]:
    """The types that fit a JSON text; none where it is no JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return frozenset()
    kind = _type_of(value)
    return frozenset(["number", "integer"]) if kind == "integer" else frozenset([kind])


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    kinds = {str: "string", int: "integer", float: "number", list: "array"}
    return kinds.get(type(value), "object")


def _refuse(word: str) -> Any:
    raise ValueError(word)  # NaN and Infinity are no JSON


def _from_python(text: str) -> str | None:
    if text[:1] not in ("{", "["):
        return None
    try:
        return json.dumps(python_value(text), ensure_ascii=False)
    except LiteralError:
        return None
