"""Which model a JSON body names, found without decoding the body.

Only members of the outermost object count. The search ends at the name, so a body that names its model first costs
the same whatever its size. A replica decodes the body later, and refuses one that gives a member twice.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection

from max_ray.errors import InputError
from max_ray.serve.api.json_body import SHORT_BODY, decode_object

MAX_TOKENS = 200_000
"""Strings and brackets that are looked at before the search gives up."""
_INLINE_BYTES = 16 * 1024
"""Bytes of a body that is searched on the event loop; a longer one is searched in a thread."""
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TOKEN = re.compile(_STRING + rb"|[{}\[\]]", re.DOTALL)
_COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")
_TEXT = re.compile(_STRING, re.DOTALL)


async def named_model(body: bytes, members: Collection[str] = ("model",)) -> str | None:
    """The model that a body names.

    Args:
        body: JSON text.
        members: Names of the member that has it, in any order.

    Returns:
        The name; None where the outermost object has no such member, or null.

    Raises:
        InputError: The body is no JSON object, the name is no text, or it stands behind too much else.
    """
    if len(body) <= _INLINE_BYTES:
        return find_model(body, members)
    return await asyncio.to_thread(find_model, body, members)


def find_model(body: bytes, members: Collection[str]) -> str | None:
    """As `named_model`, in the calling thread."""
    depth = 0
    for number, token in enumerate(_TOKEN.finditer(body)):
        if number >= MAX_TOKENS:
            raise InputError("The body holds too much before 'model': put 'model' first.", param="model")
        mark = body[token.start()]
        if mark == 0x22:  # a quote
            colon = _COLON.match(body, token.end()) if depth == 1 else None
            if colon is not None and _text_of(token[0]) in members:
                return _value_at(body, colon.end())
        else:
            depth += 1 if mark in b"{[" else -1
    _check_object(body)
    return None


def _text_of(quoted: bytes) -> str:
    try:
        text: str = json.loads(quoted)
    except ValueError:  # no UTF-8, or an escape that does not exist: such a member is not the one
        return ""
    return text


def _value_at(body: bytes, position: int) -> str | None:
    found = _TEXT.match(body, position)
    if found is not None:
        return _text_of(found[0])
    if body.startswith(b"null", position):
        return None
    _check_object(body)
    raise InputError("The field 'model' must be a text.", param="model")


def _check_object(body: bytes) -> None:
    """Raises InputError, with a reason, for a body that is no JSON object. A long one is left to the replica."""
    if len(body) <= SHORT_BODY:
        decode_object(body)
