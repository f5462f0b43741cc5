"""From a GrammarSpec to the text that the grammar library compiles. Checks what the library would not enforce."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from max_ray.errors import InputError
from max_ray.interfaces.grammar import GrammarSpec
from max_ray.structured_output.json_schema import checked_schema
from max_ray.structured_output.lark import checked_lark, inline_json
from max_ray.structured_output.structural_tag import lark_of_tags

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_TEXT_BYTES = 256 * 1024
MAX_CHOICES = 4096
_WHITESPACE: dict[str, JsonCompileOptions] = {
    "fixed": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "flexible": {"whitespace_flexible": True},
}


def grammar_text(spec: GrammarSpec) -> str:
    """What LLMatcher takes. Whether it compiles is not known yet.

    Args:
        spec: The grammar of a request.

    Raises:
        InputError: For a malformed spec, or one with a part that cannot be enforced. It names the part.
    """
    try:
        num_bytes = len(spec.text.encode())
    except UnicodeEncodeError:
        raise InputError("The grammar is not valid Unicode: it has a lone surrogate.") from None
    if num_bytes > MAX_TEXT_BYTES:
        raise InputError(f"The grammar has {num_bytes} bytes, more than {MAX_TEXT_BYTES}.")
    if spec.kind not in _BY_KIND:
        raise InputError(f"A spec of {spec.kind} is no grammar.")
    return _BY_KIND[spec.kind](spec)


def _json_schema(spec: GrammarSpec) -> str:
    schema = checked_schema(_loads(spec.text, "The JSON schema"))
    return _of_schema({"allOf": [schema]} if isinstance(schema, bool) else schema, spec)


def _json_object(spec: GrammarSpec) -> str:
    return _of_schema({"type": "object"}, spec)


def _of_schema(schema: dict[str, Any], spec: GrammarSpec) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_WHITESPACE[spec.whitespace])
    except ValueError as error:
        raise InputError(f"The JSON schema cannot be read: {_line(error)}") from None


def _regex(spec: GrammarSpec) -> str:
    r"""The whole text matches. `\d` is 0 to 9; all else as in the regex crate of Rust, which has no look-around."""
    if not spec.text:
        raise InputError("The regular expression is empty.")
    return _lark_text(f"start: /{regex_to_lark(spec.text, 'd')}/")


def _choice(spec: GrammarSpec) -> str:
    choices = _loads(spec.text, "The list of choices")
    is_list = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not is_list or not 0 < len(choices) <= MAX_CHOICES:
        raise InputError(f"The choices must be a list of 1 to {MAX_CHOICES} texts that are not empty.")
    return _lark_text("start: " + " | ".join(json.dumps(choice) for choice in dict.fromkeys(choices)))


def _lark(spec: GrammarSpec) -> str:
    return _lark_text(checked_lark(spec.text, spec.whitespace))


def _gbnf(spec: GrammarSpec) -> str:
    try:
        lark = gbnf_to_lark(spec.text)
    except (GbnfToLarkError, RecursionError) as error:
        raise InputError(f"The GBNF grammar cannot be read: {_line(error)}") from None
    return _lark_text(checked_lark(lark.removeprefix("%llguidance {}"), spec.whitespace))


def _structural_tag(spec: GrammarSpec) -> str:
    def json_of(schema: Any, path: str) -> str:
        return inline_json(checked_schema(schema, path), spec.whitespace)

    return _lark_text(lark_of_tags(_loads(spec.text, "The structural tag"), json_of))


def _lark_text(lark: str) -> str:
    """Wrapped: the library takes a bare text that begins with a brace for something else than Lark."""
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _loads(text: str, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not valid JSON: {_line(error)}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


_BY_KIND: dict[str, Callable[[GrammarSpec], str]] = {
    "json_schema": _json_schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "lark": _lark,
    "gbnf": _gbnf,
    "structural_tag": _structural_tag,
}
