"""Request fields that ask for structured output, under all their names, and their check before anything is generated.

| field                                                          | known from        |
|----------------------------------------------------------------|-------------------|
| `response_format`                                              | OpenAI            |
| `structured_outputs`                                           | vLLM              |
| `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`, `guided_json_object` | vLLM, older |
| `json_schema`, `regex`, `ebnf`, `structural_tag`               | SGLang, llama.cpp |
| `grammar`                                                      | llama.cpp         |

One of them may be given. All are enforced, with `strict` and without: what cannot be enforced is a 400.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from max_ray.errors import InputError
from max_ray.interfaces import GrammarSpec
from max_ray.interfaces.grammar import Whitespace
from max_ray.serve.api.grammar_schemas import (
    ChoiceField,
    FlagField,
    FormatField,
    GrammarField,
    OutputsField,
    RegexField,
    SchemaField,
    TagsField,
)
from max_ray.serve.api.request_fields import StrictModel
from max_ray.structured_output import GrammarChecker

RESPONSE_FORMAT = "response_format"
_CHECKER = GrammarChecker()
_CHECKS = ThreadPoolExecutor(
    2, thread_name_prefix="grammar-checks"
)  # of their own: a slow check holds up no other work
_Found = tuple[GrammarSpec, str]
"""A grammar, and the field (or part of a field) that it is of."""


class StructuredOutputFields(StrictModel):
    """Fields of both kinds of generation requests."""

    response_format: FormatField = None
    structured_outputs: OutputsField = None
    guided_json: SchemaField = None
    guided_regex: RegexField = None
    guided_choice: ChoiceField = None
    guided_grammar: GrammarField = None
    guided_json_object: FlagField = None
    json_schema: SchemaField = None
    regex: RegexField = None
    ebnf: GrammarField = None
    grammar: GrammarField = None
    structural_tag: TagsField = None

    @cached_property
    def structured_output(self) -> _Found | None:
        """The grammar, and the field that gave it. Raises InputError for malformed fields, and for two of them."""
        if not self._given_fields:
            return None
        found = [grammar for name in self._given_fields if (grammar := _READERS[name](getattr(self, name), name))]
        if len(found) > 1:
            names = " and ".join(f"'{name}'" for _, name in found[:2])
            raise InputError(f"The fields {names} both ask for structured output: give one of them.", param=found[1][1])
        return found[0] if found else None

    @property
    def _given_fields(self) -> list[str]:
        return [name for name in _READERS if name in self.model_fields_set]


def start_checker() -> None:
    """Starts the process that checks grammars, which the first request would otherwise wait for. Returns at once."""
    _CHECKS.submit(_CHECKER.check, GrammarSpec("regex", "a"))


def close_checker() -> None:
    """Ends the process; the next check starts another one."""
    _CHECKER.close()


async def check_grammar(spec: GrammarSpec | None, field: str) -> None:
    """Compiles a new grammar on trial, off the event loop. Raises InputError where it cannot be enforced."""
    if spec is None:
        return
    if _CHECKER.knows(spec):
        _CHECKER.check(spec, field)
    else:
        await asyncio.get_running_loop().run_in_executor(_CHECKS, _CHECKER.check, spec, field)


def _response_format(value: Any, field: str) -> _Found | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        _check_keys(value, {"type"}, field)
        return None
    if kind == "json_object":
        _check_keys(value, {"type", "schema"}, field)
        schema = value.get("schema")
        return (GrammarSpec("json_object"), field) if schema is None else _json_schema(schema, f"{field}.schema")
    if kind == "json_schema":
        return _of_json_schema(value, field)
    if kind == "structural_tag":
        return GrammarSpec("structural_tag", _dumps(value, field)), field
    raise InputError(
        f"The field '{field}' must be an object of the type 'text', 'json_object', 'json_schema' or 'structural_tag'.",
        param=field,
    )


def _of_json_schema(value: Mapping[str, Any], field: str) -> _Found:
    """`{"type": .., "json_schema": {"name": .., "schema": {..}}}`; llama.cpp's form has the schema beside the type."""
    if "schema" in value:
        _check_keys(value, {"type", "schema"}, field)
        return _json_schema(value["schema"], f"{field}.schema")
    _check_keys(value, {"type", "json_schema"}, field)
    inner, place = value.get("json_schema"), f"{field}.json_schema"
    if not isinstance(inner, dict):
        raise InputError(f"The field '{place}' is required and must be an object.", param=place)
    _check_keys(inner, {"name", "description", "schema", "strict"}, place)
    if inner.get("strict") not in (None, True, False):
        raise InputError(f"The field '{place}.strict' must be true or false.", param=f"{place}.strict")
    if inner.get("schema") is None:
        raise InputError(f"The field '{place}.schema' is required.", param=f"{place}.schema")
    return _json_schema(inner["schema"], f"{place}.schema")


def _structured_outputs(value: Any, field: str) -> _Found | None:
    """vLLM's object: one of json, regex, choice, grammar, json_object and structural_tag, and options."""
    readers: dict[str, Callable[[Any, str], _Found | None]] = {
        "json": _json_schema,
        "regex": _regex,
        "choice": _choice,
        "grammar": _grammar,
        "json_object": _json_object,
        "structural_tag": _structural_tag,
    }
    options = {"disable_any_whitespace", "disable_fallback", "disable_additional_properties", "whitespace_pattern"}
    if not isinstance(value, dict):
        raise InputError(f"The field '{field}' must be an object.", param=field)
    _check_keys(value, readers.keys() | options, field)
    for name in ("disable_additional_properties", "whitespace_pattern"):
        if value.get(name):
            raise InputError(f"The field '{field}.{name}' is not supported.", param=f"{field}.{name}")
    given = [name for name in readers if value.get(name) is not None]
    if len(given) != 1:
        raise InputError(f"The field '{field}' must have one of {', '.join(readers)}.", param=field)
    found = readers[given[0]](value[given[0]], f"{field}.{given[0]}")
    return found and _with_whitespace(found, value.get("disable_any_whitespace"), f"{field}.disable_any_whitespace")


def _with_whitespace(found: _Found, is_disabled: Any, field: str) -> _Found:
    if is_disabled not in (None, True, False):
        raise InputError(f"The field '{field}' must be true or false.", param=field)
    whitespace: Whitespace = "flexible" if is_disabled is False else "fixed"
    return GrammarSpec(found[0].kind, found[0].text, whitespace), found[1]


def _json_schema(value: Any, field: str) -> _Found:
    """A schema as JSON, or as the text of it."""
    if isinstance(value, str):
        return GrammarSpec("json_schema", value), field
    if not isinstance(value, dict | bool):
        raise InputError(f"The field '{field}' must be a JSON schema: an object.", param=field)
    return GrammarSpec("json_schema", _dumps(value, field)), field


def _json_object(value: Any, field: str) -> _Found | None:
    if not isinstance(value, bool):
        raise InputError(f"The field '{field}' must be true or false.", param=field)
    return (GrammarSpec("json_object"), field) if value else None


def _regex(value: Any, field: str) -> _Found:
    return GrammarSpec("regex", _text(value, field)), field


def _choice(value: Any, field: str) -> _Found:
    if not isinstance(value, list):
        raise InputError(f"The field '{field}' must be a list of texts.", param=field)
    return GrammarSpec("choice", _dumps(value, field)), field


def _grammar(value: Any, field: str) -> _Found | None:
    """GBNF where rules are written with `::=`, else Lark. An empty text asks for nothing."""
    text = _text(value, field)
    return (GrammarSpec("gbnf" if "::=" in text else "lark", text), field) if text else None


def _structural_tag(value: Any, field: str) -> _Found:
    text = value if isinstance(value, str) else _dumps(value, field)
    return GrammarSpec("structural_tag", text), field


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"The field '{field}' must be a text.", param=field)
    return value


def _dumps(value: Any, field: str) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        raise InputError(f"The field '{field}' is nested too deeply.", param=field) from None


def _check_keys(value: Mapping[str, Any], known: set[str], field: str) -> None:
    unknown = sorted(name for name in value.keys() - known if value[name] is not None)
    if unknown:
        place = f"{field}.{ascii(unknown[0][:64])[1:-1]}"
        raise InputError(f"Unknown field '{place}'.", param=place)


_READERS: dict[str, Callable[[Any, str], _Found | None]] = {
    RESPONSE_FORMAT: _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _json_schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "guided_json_object": _json_object,
    "json_schema": _json_schema,
    "regex": _regex,
    "ebnf": _grammar,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}
