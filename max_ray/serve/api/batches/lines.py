"""The input file of a batch, one request a line: what a line must be, and where each one begins.

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from max_ray.errors import InputError, quoted
from max_ray.serve.api.files.directory import new_id
from max_ray.serve.api.json_body import decode_object
from max_ray.serve.api.objects.files import BatchProblem

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""Routes that a line may be for."""
MAX_LINES = 50_000
MAX_LINE_BYTES = 8 * 2**20
MAX_CUSTOM_ID = 512
_MAX_PROBLEMS = 20
_KEYS = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True)
class LineRequest:
    """One request of a batch.

    Args:
        custom_id: The client's name of it.
        url: The route.
        body: The request's body.
    """

    custom_id: str
    url: str
    body: Mapping[str, Any]


@dataclass
class LineIndex:
    """The lines of a file.

    Args:
        custom_ids: Of each line.
        offsets: Where each line begins, in bytes.
        problems: OpenAI's error objects of a batch, at most 20; empty for a file without mistakes.
    """

    custom_ids: list[str] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    problems: list[BatchProblem] = field(default_factory=list)

    def note(self, message: str, line: int | None, param: str | None = None) -> None:
        """Adds a problem of a line, counted from 1; None for the file."""
        problem: BatchProblem = {"code": "invalid_request", "message": message, "param": param, "line": line}
        self.problems.append(problem)


def parse_line(text: bytes, endpoint: str | None = None) -> LineRequest:
    """The request in a line.

    Args:
        text: The line.
        endpoint: The route that it must be for; None: any of ENDPOINTS.

    Raises:
        InputError: The line is at fault.
    """
    content = decode_object(text)
    unknown = content.keys() - _KEYS
    if unknown:
        name = quoted(min(unknown))
        raise InputError(f"Unknown field {name}: a line has custom_id, method, url and body.", param=name[1:-1])
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        raise InputError(f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters.", param="custom_id")
    if content.get("method") != "POST":
        raise InputError("method must be 'POST'.", param="method")
    url = content.get("url")
    allowed = ENDPOINTS if endpoint is None else (endpoint,)
    if not isinstance(url, str) or url not in allowed:
        raise InputError(f"url must be {' or '.join(map(repr, allowed))}.", param="url")
    body = content.get("body")
    if not isinstance(body, dict):
        raise InputError("body must be a JSON object.", param="body")
    _check_body(body)
    return LineRequest(custom_id, url, body)


def _check_body(body: Mapping[str, Any]) -> None:
    for name in ("stream", "background"):
        if body.get(name):
            raise InputError(f"{name} is not possible in a batch: each line has one whole answer.", param=name)


def read_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset, line) of each line that is not blank. One that is too long comes cut to one byte more."""
    offset, number = 0, 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        begin, size = offset, len(line)
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            size += len(rest)
        offset += size
        number += 1
        if line.strip():
            yield number, begin, line


def index_lines(path: Path, endpoint: str) -> LineIndex:
    """Checks every line of a file, and says where each begins. Takes a second for each 50 MB or so."""
    index = LineIndex()
    known: set[str] = set()
    with path.open("rb") as file:
        for number, offset, line in read_lines(file):
            if len(index.offsets) == MAX_LINES:
                index.note(f"The file has more than {MAX_LINES} lines. Split it.", None)
            if len(index.offsets) == MAX_LINES or len(index.problems) >= _MAX_PROBLEMS:
                return index
            _add(index, known, number, offset, line, endpoint)
    if not index.offsets and not index.problems:
        index.note("The file has no line.", None)
    return index


def _add(index: LineIndex, known: set[str], number: int, offset: int, line: bytes, endpoint: str) -> None:
    if len(line) > MAX_LINE_BYTES:
        return index.note(f"The line is longer than {MAX_LINE_BYTES} bytes.", number)
    try:
        request = parse_line(line, endpoint)
    except InputError as error:
        return index.note(str(error), number, error.param)
    if request.custom_id in known:
        return index.note(f"The custom_id {quoted(request.custom_id)} stands in two lines.", number, "custom_id")
    known.add(request.custom_id)
    index.custom_ids.append(request.custom_id)
    index.offsets.append(offset)


def response_line(custom_id: str, status: int, request_id: str, body: Mapping[str, Any]) -> bytes:
    """A line of an output file (status 200) or of an error file."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _written(custom_id, response, None)


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """A line of an error file, for a request that got no answer."""
    return _written(custom_id, None, {"code": code, "message": message})


def _written(custom_id: str, response: Mapping[str, Any] | None, error: Mapping[str, str] | None) -> bytes:
    line = {"id": new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(line).encode() + b"\n"
