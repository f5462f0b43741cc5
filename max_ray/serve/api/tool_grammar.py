"""Grammars that make a model call tools, and make arguments follow their schemas.

| request                            | grammar                                              | read by          |
|------------------------------------|------------------------------------------------------|------------------|
| `tool_choice` named or "required"  | `[{"name": ..., "arguments": {...}}]`, 1 to 8 calls  | `json`           |
| the same, one call at most         | `{"name": ..., "arguments": {...}}`                  | `json`           |
| `strict: true` with "auto"         | free text; after `<tool_call>` one of the functions  | `hermes`         |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from max_ray.errors import InputError
from max_ray.interfaces import GrammarSpec
from max_ray.serve.api.tool_fields import ChatOutput

MAX_FORCED_CALLS = 8
FORCED_PARSER = "json"
STRICT_PARSER = "hermes"
_TAG = "<tool_call>"
_OPEN_PARSERS = ("hermes", "json")
"""Parsers whose models write calls between tags of plain text, so that a grammar can tell where one begins."""
_DATA = ("enum", "const", "default", "examples", "example")
_ROOT_ONLY = ("$id", "id", "$schema")


def forced_calls(chat: ChatOutput) -> GrammarSpec:
    """The grammar of an answer that is nothing but calls.

    Args:
        chat: A request that forces a call.
    """
    definitions = {f"tool_{number}": _moved(schema, number) for number, schema in enumerate(chat.tools.values())}
    calls = [_call_schema(name, f"#/$defs/tool_{number}") for number, name in enumerate(chat.tools)]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if chat.is_parallel and chat.choice == "required":
        call = {"type": "array", "items": call, "minItems": 1, "maxItems": MAX_FORCED_CALLS}
    return GrammarSpec("json_schema", json.dumps({**call, "$defs": definitions}))


def strict_calls(chat: ChatOutput, parser: str | None, special_names: Mapping[str, int]) -> GrammarSpec:
    """The grammar of a free text whose calls follow the schemas of strict functions.

    Args:
        chat: A request with strict functions.
        parser: The model's tool parser.
        special_names: Special tokens of the model; a grammar of texts does not see them.

    Raises:
        InputError: The calls of this model cannot be told from text by a grammar.
    """
    if parser not in _OPEN_PARSERS or _TAG in special_names:
        raise InputError(
            "Strict functions need a tool_choice that forces a call ('required', or a function) with this model: while "
            "it may answer with text, its calls cannot be held to a schema. Send 'strict': false otherwise.",
            param="tools",
        )
    structures = [
        {
            "begin": f'{_TAG}\n{{"name": {json.dumps(name)}, "arguments": ',
            "schema": schema if name in chat.strict else {"type": "object"},
            "end": "}\n</tool_call>",
        }
        for name, schema in chat.tools.items()
    ]
    tags = {"type": "structural_tag", "triggers": [_TAG], "structures": structures}
    return GrammarSpec("structural_tag", json.dumps(tags))


def _call_schema(name: str, arguments: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": arguments}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The schema as a definition of another: references into itself point to its new place."""
    rest = {keyword: value for keyword, value in schema.items() if keyword not in _ROOT_ONLY}
    moved: dict[str, Any] = _with_references(rest, f"#/$defs/tool_{number}")
    return moved


def _with_references(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_with_references(item, place) for item in value]
    if not isinstance(value, dict):
        return value
    moved = {key: item if key in _DATA else _with_references(item, place) for key, item in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
