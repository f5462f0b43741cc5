"""A seeded generator of malformed and borderline HTTP requests over all routes, as bytes for a socket.

Four kinds: valid bodies with a few things wrong in them, paths and methods, headers, and broken HTTP. Some are valid
after all; those ask for a token or two.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

POST_ROUTES = (
    *("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/responses/x/cancel"),
    *("/api/chat", "/api/generate", "/api/embed", "/api/show"),
    *("/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank", "/v1/files", "/v1/batches", "/v1/batches/x/cancel"),
)
GET_ROUTES = (
    *("/v1/models", "/v1/models/tiny", "/health", "/metrics", "/version", "/", "/ping", "/docs", "/openapi.json"),
    *("/tokenizer_info", "/v1/responses/x", "/v1/responses/x/input_items", "/api/tags", "/api/ps", "/api/version"),
    *("/v1/requests/x", "/v1/files", "/v1/files/x", "/v1/files/x/content", "/v1/batches", "/v1/batches/x"),
    *("/v1/server", "/page/x", "/v1/streams/x"),
)
METHODS = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "POST", "QUERY")
FIELDS = (
    *("model", "prompt", "messages", "input", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
    *("min_p", "n", "best_of", "stream", "stream_options", "stop", "stop_token_ids", "seed", "echo", "suffix", "user"),
    *("logprobs", "top_logprobs", "logit_bias", "min_tokens", "ignore_eos", "frequency_penalty", "presence_penalty"),
    *("repetition_penalty", "tools", "tool_choice", "response_format", "metadata", "store", "modalities", "audio"),
    *("encoding_format", "dimensions", "truncate", "service_tier", "reasoning_effort", "functions", "prediction"),
    *("chat_template", "chat_template_kwargs", "guided_json", "n_predict", "cache_prompt", "tokens", "system", "raw"),
    *("stop_sequences", "thinking", "options", "keep_alive", "think", "instructions", "previous_response_id", "text"),
    *("background", "reasoning", "truncation", "include", "include_obfuscation", "query", "documents", "top_n"),
    *("text_1", "text_2", "return_documents", "input_file_id", "endpoint", "completion_window", "purpose"),
    *("", "\u0000", "\ud800", "é"),
)
CONTENT_TYPES = (
    *("application/json", "application/json; charset=utf-8", "application/json;charset=latin-1", "text/plain", ""),
    *("multipart/form-data", "application/x-www-form-urlencoded", "application/vnd.api+json", "nonsense", "a" * 300),
)

_TARGET = re.compile(r"(http://127\.0\.0\.1)?/[A-Za-z0-9._~:/?\[\]@!$&'()*+,;=%-]*")  # RFC 9112, 3.2


@dataclass
class Malformed:
    """One request. `has_body_in_answer` is False for HEAD. `is_http`: a parser of HTTP may take it."""

    data: bytes
    note: str
    has_body_in_answer: bool = True
    is_http: bool = True


@dataclass
class Request:
    """A request that is about to be made wrong. `headers`: name and value, as they are written."""

    method: str
    path: str
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    version: str = "HTTP/1.1"

    def encode(self) -> bytes:
        lines = [f"{self.method} {self.path} {self.version}", *(f"{name}: {value}" for name, value in self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + self.body


class Generator:
    """`next` gives a request; the same seed, the same requests. headers: sent with every well-formed one."""

    def __init__(self, seed: int, headers: dict[str, str]) -> None:
        self._random = random.Random(seed)
        self._headers = list(headers.items())

    def next(self) -> Malformed:
        kinds: list[tuple[float, Callable[[], Malformed]]] = [
            (0.6, self._wrong_body),
            (0.15, self._wrong_path),
            (0.15, self._wrong_headers),
            (0.1, self._broken_http),
        ]
        weights, makers = zip(*kinds, strict=True)
        return self._random.choices(makers, weights)[0]()

    # Bodies.

    def _wrong_body(self) -> Malformed:
        route = self._random.choice(POST_ROUTES)
        body = self.valid_body(route)
        for _ in range(self._random.randrange(4)):
            self._spoil(body)
        text = json.dumps(body, ensure_ascii=self._random.random() < 0.5).encode("utf-8", "surrogatepass")
        if self._random.random() < 0.2:
            text = self._spoil_text(text)
        return Malformed(self._post(route, text).encode(), f"{route} {text[:120]!r}")

    def valid_body(self, route: str) -> dict[str, Any]:
        if route == "/v1/embeddings":
            return {"input": self._random.choice(["a", ["a", "b"], [1, 2], [[1], [2]]]), "model": "tiny"}
        if route == "/detokenize":
            return {"tokens": self._random.choice([[], [5, 6], [0]]), "model": "tiny"}
        if route == "/tokenize":
            return {"prompt": self._random.choice(["a", ""]), "return_token_strs": self._random.random() < 0.5}
        if route.startswith(("/v1/batches", "/v1/files")) or route.endswith(("score", "rerank")):
            return self._stored_or_scored_body(route)
        if route.startswith("/api/") or route.startswith("/v1/responses"):
            return self._other_body(route)
        body: dict[str, Any] = {"model": "tiny", "max_tokens": self._random.randrange(1, 3)}
        if self._random.random() < 0.2 and route != "/v1/messages/count_tokens":
            body["stream"] = True
        if route == "/v1/messages/count_tokens":
            del body["max_tokens"]
        if route == "/v1/completions":
            return body | {"prompt": self._random.choice(["a", ["a", "b"], [5, 6], [[5], [6]]])}
        parts = [{"type": "text", "text": "hello"}]
        messages = [{"role": "user", "content": self._random.choice(["hello", parts])}]
        if self._random.random() < 0.3 and route == "/v1/chat/completions":
            messages.insert(0, {"role": self._random.choice(["system", "developer"]), "content": "be brief"})
        return body | {"messages": messages}

    def _other_body(self, route: str) -> dict[str, Any]:
        rng = self._random
        if route.startswith("/v1/responses"):
            extras: list[dict[str, Any]] = [{}, {"stream": True}, {"background": True}, {"store": False}]
            text = rng.choice(["a", [{"role": "user", "content": "a"}]])
            return {"model": "tiny", "input": text, "max_output_tokens": rng.randrange(1, 3), **rng.choice(extras)}
        body: dict[str, Any] = {"model": "tiny"}
        if route in ("/api/embed", "/api/show"):
            return body | ({"input": "a"} if route == "/api/embed" else {})
        body |= {"options": {"num_predict": rng.randrange(1, 3)}, "stream": rng.random() < 0.5}
        messages = [{"role": "user", "content": "hello"}]
        return body | ({"prompt": "a"} if route == "/api/generate" else {"messages": messages})

    def _stored_or_scored_body(self, route: str) -> dict[str, Any]:
        if route.endswith("score"):
            return {"model": "tiny", "text_1": "a", "text_2": self._random.choice(["b", ["b", "c"]])}
        if route.endswith("rerank"):
            return {"model": "tiny", "query": "a", "documents": ["b", "c"], "top_n": self._random.randrange(1, 3)}
        return {"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"}

    def _spoil(self, body: dict[str, Any]) -> None:
        """One change at some depth."""
        place: Any = body
        while self._random.random() < 0.5:
            inner = [value for value in _values(place) if isinstance(value, (dict, list)) and value]
            if not inner:
                break
            place = self._random.choice(inner)
        if isinstance(place, list):
            place[self._random.randrange(len(place))] = self._junk()
        elif place and self._random.random() < 0.2:
            place.pop(self._random.choice(list(place)))
        else:
            names = FIELDS if place is body else ("role", "content", "type", "text", "image_url", "name", *FIELDS[-4:])
            place[self._random.choice([*names, *place])] = self._junk()

    def _junk(self, depth: int = 0) -> Any:
        choice = self._random.choice
        if depth < 3 and self._random.random() < 0.3:
            items = [self._junk(depth + 1) for _ in range(self._random.randrange(4))]
            return items if self._random.random() < 0.5 else {choice(FIELDS): item for item in items}
        return choice(
            [
                *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e-320, 1e308),
                *(float("nan"), float("inf"), -float("inf"), "", "a", "1", "null", "\u0000", "\ud800", "\udfff\ud800"),
                *("😀" * 20, "é", "\u202e", "{{7*7}}", "<|im_end|>", "</s>", "a" * 5000, "../../etc/passwd", "\\"),
                *([], {}, [[]], [{}], {"": {}}, ["a"] * 200, [0] * 500, {"type": "text"}, {"type": "image_url"}),
                *({"type": "json_object"}, {"image_url": {"url": "http://127.0.0.1/"}}, "data:image/png;base64,AAAA"),
                *("user", "tool", "auto", "none", ["x" * 100] * 20, list(range(3000)), {str(i): i for i in range(200)}),
            ]
        )

    def _spoil_text(self, text: bytes) -> bytes:
        rng = self._random
        place = rng.randrange(len(text) + 1)
        return rng.choice(
            [
                lambda: text[:place],
                lambda: text + rng.choice([b"}", b"x", b"\x00", b"{}", b"\n\n", b","]),
                lambda: text[:place] + rng.randbytes(rng.randrange(1, 9)) + text[place:],
                lambda: b"\xef\xbb\xbf" + text,
                lambda: text.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass"),
                lambda: b'{"model": "x", ' + text[1:],
                lambda: b"[" * rng.choice([2, 100, 100_000]) + text,
                lambda: b'{"a":' * rng.choice([2, 500, 20_000]) + text,
                lambda: b"",
                lambda: b" " * 10_000,
                lambda: b'{"prompt": "a", "max_tokens": ' + b"9" * rng.choice([20, 4301, 50_000]) + b"}",
                lambda: b"[" + b"1," * rng.choice([10, 30_000]) + b"1]",
                lambda: rng.choice([b"null", b"1", b'"a"', b"[]", b"true", b"NaN", b"-Infinity", b"{}"]),
            ]
        )()

    # Paths and methods.

    def _wrong_path(self) -> Malformed:
        rng = self._random
        path = rng.choice([*POST_ROUTES, *GET_ROUTES, *GET_ROUTES])
        path = rng.choice(
            [
                lambda: path,
                lambda: path + "/",
                lambda: "/" + path,
                lambda: path + rng.choice(["?", "?a=b", "?%00", "#x", "/..", "/../health", "%2f", ";x=1", "\\"]),
                lambda: path.upper(),
                lambda: path[: rng.randrange(1, len(path) + 1)],
                lambda: path + "/" + "a" * rng.choice([1, 1000, 3000]),
                lambda: path + rng.choice(["/%ff%fe", "/%zz", "/%", "/%00", "/%0d%0aX: y", "/..%2f..%2fetc%2fpasswd"]),
                lambda: "http://127.0.0.1" + path,
                lambda: rng.choice(
                    ["/-/routes", "/-/healthz", "/docs", "/openapi.json", "/v1", "/v1/", "*", "/favicon.ico"]
                ),
            ]
        )()
        request = Request(rng.choice(METHODS), path, [("Host", "127.0.0.1"), *self._headers])
        if request.method in ("POST", "PUT", "PATCH") or rng.random() < 0.1:
            request = self._post(path, json.dumps(self.valid_body(POST_ROUTES[0])).encode(), request.method)
        is_http = _TARGET.fullmatch(path) is not None or (path, request.method) == ("*", "OPTIONS")
        return Malformed(request.encode(), f"{request.method} {path[:80]}", request.method != "HEAD", is_http)

    # Headers.

    def _wrong_headers(self) -> Malformed:
        rng = self._random
        route = rng.choice(POST_ROUTES)
        request = self._post(route, json.dumps(self.valid_body(route)).encode())
        name, value = rng.choice(
            [
                lambda: ("Content-Type", rng.choice(CONTENT_TYPES)),
                lambda: (
                    "Content-Encoding",
                    rng.choice(["gzip", "br", "deflate", "identity", "zstd", "gzip, gzip", "x"]),
                ),
                lambda: (
                    "Host",
                    rng.choice(
                        ["evil.example", "localhost", "127.0.0.1:1", "[::1]", "", "a" * 300, "127.0.0.1.evil.example"]
                    ),
                ),
                lambda: ("Origin", rng.choice(["https://evil.example", "null", "http://localhost", "file://", "x"])),
                lambda: ("Sec-Fetch-Site", rng.choice(["cross-site", "same-origin", "none", "?"])),
                lambda: ("Authorization", rng.choice(["", "Bearer", "Bearer  ", "Bearer wrong", "Basic eDp5", "é"])),
                lambda: (
                    "x-request-timeout-seconds",
                    rng.choice(["-1", "0", "nan", "inf", "1e9", "abc", "0.001", "", "١"]),
                ),
                lambda: ("x-request-disconnect-disabled", rng.choice(["?1", "?0", "1", "true", ""])),
                lambda: ("Accept", rng.choice(["text/event-stream", "image/png", "", "*/*;q=0"])),
                lambda: ("Expect", rng.choice(["100-continue", "200-ok"])),
                lambda: ("Connection", rng.choice(["close", "upgrade", "keep-alive, Host", "x"])),
                lambda: ("Upgrade", rng.choice(["websocket", "h2c"])),
                lambda: ("traceparent", rng.choice(["00-" + "0" * 32 + "-" + "0" * 16 + "-00", "x" * 200])),
                lambda: (f"X-{rng.randrange(100)}", "a" * rng.choice([0, 10, 4000])),
                lambda: ("serve_multiplexed_model_id", rng.choice(["x", "", "../a"])),
                lambda: ("x-request-id", rng.choice(["a", "", "a" * 1000, "é"])),
            ]
        )()
        if rng.random() < 0.7:
            request.headers = [header for header in request.headers if header[0] != name]
        request.headers.append((name, value))
        if rng.random() < 0.2:
            request.version = "HTTP/1.0"
        has_one_host = sum(header[0] == "Host" for header in request.headers) == 1
        return Malformed(request.encode(), f"{route} {name}: {value[:60]}", is_http=has_one_host)

    # Broken HTTP.

    def _broken_http(self) -> Malformed:
        rng = self._random
        route = rng.choice(POST_ROUTES)
        body = json.dumps(self.valid_body(route)).encode()
        good = self._post(route, body).encode()
        head, _, rest = good.partition(b"\r\n\r\n")
        bad = rng.choice(
            [
                lambda: good.replace(b"POST ", rng.choice([b"post ", b"P\x00ST ", b"", b"POST\t", b"\x16\x03\x01"]), 1),
                lambda: good.replace(b"HTTP/1.1", rng.choice([b"HTTP/9.9", b"HTTP/1", b"", b"HTCPCP/1.0"]), 1),
                lambda: good.replace(b"Content-Length", rng.choice([b"Content Length", b"Content-Length ", b":"]), 1),
                lambda: head + b"\r\nContent-Length: 3\r\n\r\n" + rest,
                lambda: head + b"\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n0\r\n\r\n",
                lambda: _chunked(head, rng.choice([b"-1\r\n", b"fffffffffffffffff\r\n", b"5;x=y\r\nab"])),
                lambda: head + b"\r\n" + rng.randbytes(rng.randrange(1, 40)).replace(b"\n", b"") + b"\r\n\r\n" + rest,
                lambda: head + b"\r\nX: a\x00b\r\n\r\n" + rest,
                lambda: head + b"\r\nX\xc3\xa9: a\r\n\r\n" + rest,
                lambda: head + b"\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(300)) + b"\r\n" + rest,
                lambda: head + b"\r\nX: " + b"a" * 40_000 + b"\r\n\r\n" + rest,
                lambda: good.replace(b" /", b" /" + b"a" * 40_000, 1),
                lambda: good.replace(b"\r\n", b"\n", 3),
                lambda: rng.randbytes(rng.randrange(1, 200)) + b"\r\n\r\n",
                lambda: b"\r\n\r\n" + rng.randbytes(10) + b"\r\n\r\n",
            ]
        )()
        return Malformed(bad, f"broken {bad[:80]!r}", is_http=False)

    def _post(self, path: str, body: bytes, method: str = "POST") -> Request:
        headers = [("Host", "127.0.0.1"), *self._headers, ("Content-Type", "application/json")]
        return Request(method, path, [*headers, ("Content-Length", str(len(body)))], body)


def _values(place: Any) -> list[Any]:
    return list(place.values()) if isinstance(place, dict) else place


def _chunked(head: bytes, chunks: bytes) -> bytes:
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    return b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b""]) + chunks + b"\r\n0\r\n\r\n"
