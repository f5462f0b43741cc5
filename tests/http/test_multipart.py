"""The reader of forms: every split gives the same parts, and what is no form is refused."""

from __future__ import annotations

import random
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import HTTP

import pytest

from max_ray.errors import InputError
from max_ray.serve.api.files.multipart import MAX_HEADER_BYTES, MAX_PARTS, MultipartReader, PartBegin, PartData

TYPE = "multipart/form-data; boundary=xyz"
Parts = list[tuple[str, str | None, bytes]]


def encoded(parts: Parts, boundary: str = "xyz") -> bytes:
    body = b""
    for name, filename, content in parts:
        file = f'; filename="{filename}"\r\nContent-Type: text/plain' if filename is not None else ""
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


def read(pieces: list[bytes], content_type: str = TYPE) -> Parts:
    reader = MultipartReader(content_type)
    parts: Parts = []
    for piece in pieces:
        for event in reader.feed(piece):
            if isinstance(event, PartBegin):
                parts.append((event.name, event.filename, b""))
            else:
                assert isinstance(event, PartData)
                parts[-1] = (*parts[-1][:2], parts[-1][2] + event.data)
    reader.end()
    return parts


PARTS: Parts = [("purpose", None, b"batch"), ("file", "a b.jsonl", b"\r\n--xy\r\n--xyZ\r\n-"), ("empty", None, b"")]


def test_every_split_in_two_gives_the_same() -> None:
    body = encoded(PARTS)
    for cut in range(len(body) + 1):
        assert read([body[:cut], body[cut:]]) == PARTS, cut
    assert read([body[i : i + 1] for i in range(len(body))]) == PARTS


def test_random_forms_agree_with_the_standard_library() -> None:
    rng = random.Random(7)
    signs = [b"\r", b"\n", b"-", b"--", b"xyz", b"a", b"\x00", b"\xff", b"\r\n--", b"\r\n--xy"]
    for _ in range(300):
        parts: Parts = []
        for number in range(rng.randrange(1, 6)):
            content = b"".join(rng.choices(signs, k=rng.randrange(30)))
            if b"\r\n--xyz" in b"\r\n" + content:
                continue
            parts.append((f"p{number}", rng.choice([None, "f.txt"]), content))
        body = encoded(parts)
        pieces, rest = [], body
        while rest:
            size = rng.randrange(1, 20)
            pieces, rest = [*pieces, rest[:size]], rest[size:]
        assert read(pieces) == parts
        if any(b"--xyz" in content for _, _, content in parts):
            continue  # the standard library takes a boundary behind a bare CR or LF
        names = [name for name, _, _ in parts]
        message = BytesParser(EmailMessage, policy=HTTP).parsebytes(f"Content-Type: {TYPE}\r\n\r\n".encode() + body)
        found = [part.get_param("name", header="content-disposition") for part in message.iter_parts()]
        assert found == names


def test_what_a_form_may_have_besides() -> None:
    body = encoded(PARTS)
    assert read([b"preamble\r\n", body, b"epilogue" * 100]) == PARTS
    assert read([body.replace(b"--xyz\r\n", b"--xyz \t\r\n")]) == PARTS
    assert read([body.replace(b"xyz", b"q.1")], 'multipart/form-data; boundary="q.1"')[0] == PARTS[0]
    assert read([encoded([("f", "ä", b"1")])]) == [("f", "ä", b"1")]


@pytest.mark.parametrize(
    ("content_type", "body", "word"),
    [
        ("application/json", b"", "multipart/form-data"),
        ("", b"", "multipart/form-data"),
        ("multipart/form-data", b"", "multipart/form-data"),
        (f"multipart/form-data; boundary={'b' * 71}", b"", "70"),
        (TYPE, b"", "not complete"),
        (TYPE, encoded(PARTS)[:-6], "not complete"),
        (TYPE, b"--xyzw\r\n\r\n", "boundary"),
        (TYPE, b"--xyz" + b" " * 100, "boundary"),
        (TYPE, b"--xyz\r\n\r\nbody\r\n--xyz--", "no name"),
        (TYPE, b"--xyz\r\n" + b"a" * (MAX_HEADER_BYTES + 10), "headers"),
        (TYPE, encoded([("a", None, b"")] * (MAX_PARTS + 1)), "parts"),
    ],
)
def test_what_is_refused(content_type: str, body: bytes, word: str) -> None:
    with pytest.raises(InputError, match=word):
        read([body], content_type)
