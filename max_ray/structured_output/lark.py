"""Grammars in Lark's syntax that come from a client: what in them would not be enforced is refused.

The grammar library's Lark has parts that step outside a grammar over text: references to special tokens (a client could
write control tokens), options that are ignored here (`temperature`) or take text back (`stop`), directives
that change the parser, and inline JSON schemas with their own options. JSON schemas in it are checked as all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from max_ray.errors import InputError
from max_ray.structured_output.json_schema import checked_schema

_PIECE = re.compile(
    r"""
    (?P<comment> //[^\n]* | \#[^\n]* )
  | (?P<string> "(?:[^"\\\n]|\\.)*" )
  | (?P<regex> /(?:[^/\\\n]|\\.)+/ )
  | (?P<json> %json\b\s* )
  | (?P<directive> %[A-Za-z]+ )
  | (?P<token> <[^>\n]*> )
    """,
    re.VERBOSE,
)
_DIRECTIVES = {"%ignore", "%import", "%regex"}
_OPTION = re.compile(r"\b(stop|stop_capture|temperature)\s*=")  # nothing else in Lark has a name before `=`
_JSON_OPTIONS = {
    "fixed": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "flexible": {"whitespace_flexible": True},
}


def checked_lark(text: str, whitespace: str) -> str:
    """The grammar with its inline JSON schemas checked and their whitespace set.

    Args:
        text: The grammar.
        whitespace: `fixed` or `flexible`, for the inline JSON schemas.

    Raises:
        InputError: For a part that cannot be enforced.
    """
    return "".join(_checked_pieces(text, whitespace))


def inline_json(schema: Any, whitespace: str) -> str:
    """`%json {...}`: a schema inside of a Lark grammar.

    Args:
        schema: A checked schema: an object or a boolean.
        whitespace: `fixed` or `flexible`.
    """
    body = {"allOf": [schema]} if isinstance(schema, bool) else schema
    return "%json " + json.dumps({"x-guidance": _JSON_OPTIONS[whitespace], **body})


def _checked_pieces(text: str, whitespace: str) -> Iterator[str]:
    place, rules = 0, ""
    while match := _PIECE.search(text, place):
        rules += text[place : match.start()]
        yield text[place : match.start()]
        place = match.end()
        if match.lastgroup == "json":
            schema, place = _schema_at(text, place)
            yield inline_json(checked_schema(schema), whitespace) + " "
        else:
            _check_piece(match.lastgroup, match[0])
            yield match[0]
    option = _OPTION.search(rules + text[place:])
    if option is not None:
        raise InputError(f"The grammar's rule option {option[1]!r} is not supported.")
    yield text[place:]


def _schema_at(text: str, place: int) -> tuple[Any, int]:
    try:
        schema, end = json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        raise InputError("A %json of the grammar is not followed by a JSON schema.") from None
    return schema, end


def _check_piece(kind: str | None, piece: str) -> None:
    if kind == "token":
        raise InputError(f"The grammar refers to a special token, {piece[:64]!a}: only text can be matched here.")
    if kind == "directive" and piece not in _DIRECTIVES:
        raise InputError(f"The grammar's directive {piece[:64]!a} is not supported.")
