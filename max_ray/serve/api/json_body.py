"""From the bytes of a body to Python objects, with bounds on what that takes.

A decoder holds the interpreter's lock from the first byte to the last, so a thread does not free the event loop from
it. What it makes is bounded before it begins: a value takes two bytes of a body and up to twenty times as much memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jiter
import numpy as np

from max_ray.errors import InputError, quoted

SHORT_BODY = 64 * 1024
"""Bytes of a body that is decoded at once, on the event loop."""

MAX_DECODED_BYTES = 24 * 2**20
"""Of the objects that a body becomes, without the characters of its texts."""

MAX_WIDE_CHARACTERS = MAX_DECODED_BYTES // 4
"""Of one text in a long body with a character beyond U+FFFF: Python keeps all its characters in four bytes each."""

_BYTES_OF_A_VALUE = 44  # a number in a list: what stands behind a comma
_BYTES_OF_A_QUOTE = 32  # half a short text
_BYTES_OF_A_CONTAINER = 200  # a small dict or list
_SCANNED_AT_ONCE = 2**17  # counting takes sixteen bytes for each
_SURROGATE = re.compile(rb"\\u[dD][89abAB]")
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def decode_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body` (RFC 8259: UTF-8; a byte order mark is passed over).

    Raises InputError for everything else, for a key that is given twice, for NaN and Infinity, for more than 200
    levels, for a long body of which the objects would take more than MAX_DECODED_BYTES, and for one of
    more than MAX_WIDE_CHARACTERS in a text of wide characters.
    """
    body = body.removeprefix(_BYTE_ORDER_MARK)
    if not body or body.isspace():
        raise InputError("The body is empty. Send a JSON object.")
    if len(body) > SHORT_BODY and decoded_bytes(body) > MAX_DECODED_BYTES:
        raise InputError("The body holds more values than one request may have. Split the request.")
    if len(body) > MAX_WIDE_CHARACTERS and _is_wide(body) and _longest_text(body) > MAX_WIDE_CHARACTERS:
        raise InputError(
            f"A text with characters beyond U+FFFF may have {MAX_WIDE_CHARACTERS} bytes at most. Split the request."
        )
    try:
        content = jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        content = _explained(body, str(error))
    if not isinstance(content, dict):
        raise InputError('The body must be a JSON object, such as {"model": ..., "prompt": ...}.')
    return content


def decoded_bytes(body: bytes) -> int:
    """About how much memory the objects of `body` take. Never too little; too much only below MAX_DECODED_BYTES."""
    counts = np.array([body.count(sign) for sign in (b",", b'"', b"{", b"[")])
    if _estimate(counts) <= MAX_DECODED_BYTES:
        return _estimate(counts)
    counts[:] = 0  # commas and brackets in texts cost nothing: count those outside
    for outside, num_quotes in _pieces_outside_texts(body):
        of_byte = np.bincount(outside, minlength=256)
        counts += [of_byte[ord(",")], num_quotes, of_byte[ord("{")], of_byte[ord("[")]]
    return _estimate(counts)


def _estimate(counts: np.ndarray[Any, Any]) -> int:
    commas, quotes, braces, brackets = counts.tolist()
    containers = braces + brackets
    return int(commas * _BYTES_OF_A_VALUE + quotes * _BYTES_OF_A_QUOTE + containers * _BYTES_OF_A_CONTAINER)


def _is_wide(body: bytes) -> bool:
    """Whether it may have a character beyond U+FFFF, written as itself or as two escapes."""
    return int(np.frombuffer(body, np.uint8).max()) >= 0xF0 or _SURROGATE.search(body) is not None


def _longest_text(body: bytes) -> int:
    """About the bytes of the longest string: of the longest piece between two quotes that are not escaped."""
    return max((len(piece.group()) for piece in _TEXT.finditer(body)), default=0)


def _pieces_outside_texts(body: bytes) -> Iterator[tuple[np.ndarray[Any, Any], int]]:
    """The bytes that are in no string, and the number of quotes, a piece of the body at a time."""
    begin, is_inside = 0, 0
    while begin < len(body):
        piece = body[begin : begin + _SCANNED_AT_ONCE]
        num_backslashes = len(piece) - len(piece.rstrip(b"\\"))
        if num_backslashes % 2 and len(piece) > 1:  # what the last one escapes goes with it
            piece = piece[:-1]
        begin += len(piece)
        piece = piece.replace(b"\\\\", b"..").replace(b'\\"', b"..")
        signs = np.frombuffer(piece, np.uint8)
        quotes = signs == ord('"')
        inside = np.bitwise_xor.accumulate(quotes) ^ bool(is_inside)
        is_inside = int(inside[-1])
        yield signs[~inside], int(np.count_nonzero(quotes))


class _NotANumber:
    """NaN or an infinity, where Python's decoder met one."""

    def __init__(self, name: str) -> None:
        self.name = name


def _explained(body: bytes, problem: str) -> Any:
    """What the strict decoder refused. Raises InputError that says where.

    A short body is decoded by a second, slower decoder that names keys, and takes one thing more: lone surrogates, for
    they are told by the field that they are in.
    """
    general = InputError(f"The body is not valid JSON: {problem}.")
    if len(body) > SHORT_BODY:
        raise general
    try:
        content = json.loads(body.decode(), object_pairs_hook=_without_duplicates, parse_constant=_NotANumber)
    except UnicodeDecodeError as error:
        raise InputError(f"The body is not valid JSON: it is not UTF-8 (byte {error.start}).") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise general from None
    for place, value in _leaves(content):
        if isinstance(value, _NotANumber):
            raise InputError(f"The body is not valid JSON: {place or 'it'} is {value.name}.", param=place or None)
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise InputError(f"The key {quoted(twice)} is given twice.", param=quoted(twice)[1:-1])
    return content


def _leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """Every value that holds no others, with its path."""
    stack = [("", content)]
    while stack:
        place, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{place}.{key}" if place else quoted(key)[1:-1], inner) for key, inner in value.items()]
        elif isinstance(value, list):
            stack += [(f"{place}[{position}]", inner) for position, inner in enumerate(value)]
        else:
            yield place, value
