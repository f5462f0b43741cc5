"""Grammars that make a model call tools, and make arguments follow their schemas.

| request                            | grammar                                              | read by          |
|------------------------------------|------------------------------------------------------|------------------|
| `tool_choice` named or "required"  | `[{"name": ..., "arguments": {...}}]`, 1 to 8 calls  | `json`           |
| the same, one call at most         | `{"name": ..., "arguments": {...}}`                  | `json`           |
| `strict: true` with "auto"         | free text; after `<tool_call>` one of the functions  | `hermes`         |
| JSON `response_format` with "auto" | the answer, or calls between `<tool_call>` tags      | `hermes`         |
| the same, tags are no plain text   | the answer, or one call as in the second line        | `json`           |
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
_TAG, _END = "<tool_call>", "}\n</tool_call>"
_OPEN_PARSERS = ("hermes", "json")
"""Parsers whose models write calls between tags of plain text, so that a grammar can tell where one begins."""
_DATA = ("enum", "const", "default", "examples", "example")
_ROOT_ONLY = ("$id", "id", "$schema")


def tool_grammar(
    chat: ChatOutput, answer: GrammarSpec | None, field: str, parser: str | None, special_names: Mapping[str, int]
) -> tuple[GrammarSpec | None, str | None]:
    """The grammar of a request with tools, and the parser of its answer.

    Args:
        chat: How the answer is read.
        answer: The grammar that the request asks for.
        field: The field that asked for it.
        parser: The model's tool parser.
        special_names: Special tokens of the model; a grammar of texts does not see them.

    Raises:
        InputError: There is no such grammar.
    """
    has_tags = parser in _OPEN_PARSERS and _TAG not in special_names
    if answer is not None:
        if chat.is_forced or answer.kind not in ("json_schema", "json_object"):
            raise InputError(
                f"The answer cannot follow {field} and have tool calls: leave out one of them, or send a JSON schema "
                f"with tool_choice 'auto' or 'none'.",
                param=field,
            )
        schema = _schema_of(answer, field)
        return (_answer_or_tags(chat, schema), STRICT_PARSER) if has_tags else (_answer_or_call(chat, schema), "json")
    if chat.is_forced:
        return forced_calls(chat), FORCED_PARSER
    if not chat.strict:
        return None, parser
    if not has_tags:
        raise InputError(
            "Strict functions need a tool_choice that forces a call ('required', or a function) with this model: while "
            "it may answer with text, its calls cannot be held to a schema. Send 'strict': false otherwise.",
            param="tools",
        )
    return strict_calls(chat), STRICT_PARSER


def _schema_of(answer: GrammarSpec, field: str) -> Any:
    if answer.kind == "json_object":
        return {"type": "object"}
    try:
        return json.loads(answer.text)
    except (ValueError, RecursionError):
        raise InputError(f"The JSON schema of {field} is not valid JSON.", param=field) from None


def forced_calls(chat: ChatOutput) -> GrammarSpec:
    """The grammar of an answer that is nothing but calls.

    Args:
        chat: A request that forces a call.
    """
    definitions = {
        f"tool_{number}": _moved(schema, f"tool_{number}") for number, schema in enumerate(chat.tools.values())
    }
    calls = [_call_schema(name, f"#/$defs/tool_{number}") for number, name in enumerate(chat.tools)]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if chat.is_parallel and chat.choice == "required":
        call = {"type": "array", "items": call, "minItems": 1, "maxItems": MAX_FORCED_CALLS}
    return GrammarSpec("json_schema", json.dumps({**call, "$defs": definitions}))


def strict_calls(chat: ChatOutput) -> GrammarSpec:
    """The grammar of a free text whose calls follow the schemas of strict functions.

    Args:
        chat: A request with strict functions.
    """
    structures = [{"begin": _begin(name), "schema": _arguments_of(chat, name), "end": _END} for name in chat.tools]
    tags = {"type": "structural_tag", "triggers": [_TAG], "structures": structures}
    return GrammarSpec("structural_tag", json.dumps(tags))


def _begin(name: str) -> str:
    return f'{_TAG}\n{{"name": {json.dumps(name)}, "arguments": '


def _arguments_of(chat: ChatOutput, name: str) -> Mapping[str, Any]:
    """What a grammar holds the arguments to; an object, where the function is not strict."""
    return chat.tools[name] if name in chat.strict else {"type": "object"}


def _answer_or_tags(chat: ChatOutput, schema: Any) -> GrammarSpec:
    calls = [f"{json.dumps(_begin(name))} tool_{number} {json.dumps(_END)}" for number, name in enumerate(chat.tools)]
    rules = [f"tool_{number}: %json {json.dumps(_arguments_of(chat, name))}" for number, name in enumerate(chat.tools)]
    start = ["start: answer | calls", f"answer: %json {json.dumps(schema)}", 'calls: call ("\\n" call)*']
    return GrammarSpec("lark", "\n".join([*start, f"call: {' | '.join(calls)}", *rules]))


def _answer_or_call(chat: ChatOutput, schema: Any) -> GrammarSpec:
    definitions = {"answer": _moved(schema, "answer") if isinstance(schema, dict) else schema}
    calls: list[dict[str, Any]] = [{"$ref": "#/$defs/answer"}]
    for number, name in enumerate(chat.tools):
        definitions[f"tool_{number}"] = _moved(_arguments_of(chat, name), f"tool_{number}")
        calls.append(_call_schema(name, f"#/$defs/tool_{number}"))
    return GrammarSpec("json_schema", json.dumps({"anyOf": calls, "$defs": definitions}))


def _call_schema(name: str, arguments: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": arguments}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The schema as a definition of another: references into itself point to its new place."""
    rest = {keyword: value for keyword, value in schema.items() if keyword not in _ROOT_ONLY}
    moved: dict[str, Any] = _with_references(rest, f"#/$defs/{name}")
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
