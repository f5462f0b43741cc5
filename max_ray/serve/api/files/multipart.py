"""A reader of multipart/form-data (RFC 7578) that gives each part as it arrives, so that no file is held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

from max_ray.errors import InputError, quoted

MAX_HEADER_BYTES = 8 * 1024
MAX_PARTS = 16
_LINE_END = b"\r\n"
_PADDING = b" \t"
_MAX_PADDING = 64
_MAX_BOUNDARY = 70  # RFC 2046


@dataclass(frozen=True)
class PartBegin:
    """A part begins.

    Args:
        name: Of the form's field.
        filename: Of a file; None for a plain field.
    """

    name: str
    filename: str | None


@dataclass(frozen=True)
class PartData:
    """A piece of the part that began last."""

    data: bytes


FormEvent = PartBegin | PartData


class MultipartReader:
    """Feed it the body in pieces of any size, then `end` it.

    Args:
        content_type: The header of the request.

    Raises:
        InputError: The header is not that of a form.
    """

    def __init__(self, content_type: str) -> None:
        header = Message()
        header["Content-Type"] = content_type
        boundary = header.get_param("boundary")
        if header.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
            raise InputError("The body must be a form: send `Content-Type: multipart/form-data; boundary=...`.")
        if not 1 <= len(boundary) <= _MAX_BOUNDARY or not boundary.isascii():
            raise InputError(f"The boundary of a form has from 1 to {_MAX_BOUNDARY} ASCII characters.")
        self._delimiter = _LINE_END + b"--" + boundary.encode()
        self._buffer = bytearray(_LINE_END)  # the first delimiter may begin the body
        self._state = "preamble"
        self._num_parts = 0

    def feed(self, data: bytes) -> Iterator[FormEvent]:
        """The events that `data` completes. Raises InputError for what is no form."""
        self._buffer += data
        while True:
            before = (self._state, len(self._buffer))
            if self._state in ("preamble", "data"):
                yield from self._until_delimiter()
            elif self._state == "delimiter":
                self._after_delimiter()
            elif self._state == "headers":
                yield from self._headers()
            else:
                self._buffer.clear()
            if (self._state, len(self._buffer)) == before or not self._buffer:
                return

    def end(self) -> None:
        """Raises InputError where the form is not complete."""
        if self._state != "epilogue":
            raise InputError("The form is not complete: its closing boundary is missing.")

    def _until_delimiter(self) -> Iterator[FormEvent]:
        found = self._buffer.find(self._delimiter)
        num_known = found if found >= 0 else max(0, len(self._buffer) - len(self._delimiter) + 1)
        piece = bytes(self._buffer[:num_known])
        del self._buffer[:num_known]
        if piece and self._state == "data":
            yield PartData(piece)
        if found >= 0:
            del self._buffer[: len(self._delimiter)]
            self._state = "delimiter"

    def _after_delimiter(self) -> None:
        """Two dashes end the form; else a line ends, and the headers of a part begin."""
        if self._buffer.startswith(b"--"):
            self._state = "epilogue"
            return
        end = self._buffer.find(_LINE_END)
        if end < 0 and len(self._buffer) <= _MAX_PADDING:
            return
        if end < 0 or self._buffer[:end].strip(_PADDING):
            raise InputError("The form is malformed: a boundary is not followed by the end of its line.")
        del self._buffer[:end]  # the line end stays: the headers may be empty
        self._state = "headers"

    def _headers(self) -> Iterator[FormEvent]:
        end = self._buffer.find(_LINE_END * 2)
        if end < 0:
            if len(self._buffer) > MAX_HEADER_BYTES:
                raise InputError(f"The headers of a form's part are longer than {MAX_HEADER_BYTES} bytes.")
            return
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InputError(f"The form has more than {MAX_PARTS} parts.")
        begin = _part_of(bytes(self._buffer[:end]))
        del self._buffer[: end + 2 * len(_LINE_END)]
        self._state = "data"
        yield begin


def _part_of(headers: bytes) -> PartBegin:
    """Raises InputError for a part without a name."""
    message = Message()
    for line in headers.decode("utf-8", errors="replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            message["Content-Disposition"] = value.strip()
    field = message.get_param("name", header="content-disposition")
    if not isinstance(field, str) or not field:
        raise InputError(f"A part of the form has no name in its Content-Disposition: {quoted(str(field))}.")
    return PartBegin(field, message.get_filename())
