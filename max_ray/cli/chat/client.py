"""Client: HTTP calls to an OpenAI-compatible server, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from max_ray import settings
from max_ray.config.models import is_loopback
from max_ray.errors import MaxRayError

DEFAULT_URL = "http://127.0.0.1:8000"
_ANSWERS_WITHIN_S = 10.0
_MAX_ERROR_BYTES = 1 << 16


class ServerError(MaxRayError):
    """The server cannot be reached, or refuses a request. `status` is its HTTP status, None without an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Piece:
    """A part of a streamed answer.

    Args:
        content: Text of the answer.
        reasoning: Text of the reasoning.
        finish_reason: Of the last piece with text.
        num_tokens: Tokens of the whole answer, in the piece that tells the usage.
    """

    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None


class Client:
    """Calls one server.

    Args:
        url: Address of the server, with or without `/v1`.
        api_key: Sent as a bearer token. By default the first of MAX_RAY_API_KEYS for a server of this machine, and
            OPENAI_API_KEY for another.
        ca_file: Certificates to trust besides the system's, for a server of this machine: the name in one is not
            compared with the address.

    Raises:
        ServerError: The address is no URL.
    """

    def __init__(self, url: str = DEFAULT_URL, api_key: str | None = None, ca_file: str | None = None) -> None:
        url = url if "://" in url else f"http://{url}"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"{url} is no address of a server: give one like {DEFAULT_URL}.")
        self.root = url.rstrip("/").removesuffix("/v1")
        is_local = is_loopback(parts.hostname)
        key = api_key or _key_of_environment(is_local)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        handlers: list[urllib.request.BaseHandler] = []
        if is_local:
            handlers.append(urllib.request.ProxyHandler({}))  # whatever http_proxy says
        if ca_file is not None:
            assert is_local, "the certificate of another machine has its name"
            context = ssl.create_default_context(cafile=ca_file)
            context.check_hostname = False
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str, timeout_s: float = _ANSWERS_WITHIN_S) -> Any:
        """The JSON of a GET. Raises ServerError."""
        with self._answer(path, None, timeout_s) as answer:
            return _json(answer.read(), self.root)

    def is_up(self) -> bool:
        """Whether the server says that it is healthy."""
        try:
            with self._answer("/health", None, _ANSWERS_WITHIN_S):
                return True
        except ServerError:
            return False

    def models(self) -> list[str]:
        """Names of the served models. Raises ServerError."""
        listed = self.get("/v1/models")
        try:
            return [str(model["id"]) for model in listed["data"]]
        except (KeyError, TypeError):
            raise ServerError(
                f"{self.root}/v1/models gives no list of models: is it an OpenAI-compatible server?"
            ) from None

    def stream(self, body: Mapping[str, Any]) -> Generator[Piece, None, None]:
        """The pieces of a chat's answer, as they come. Closing the iterator ends the request. Raises ServerError."""
        request = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._answer("/v1/chat/completions", request, None) as answer:
            for line in answer:
                name, _, value = line.decode("utf-8", "replace").strip().partition(":")
                if name != "data" or value.strip() == "[DONE]":
                    continue
                yield _piece(_json(value.encode(), self.root))

    @contextmanager
    def _answer(self, path: str, body: Any, timeout_s: float | None) -> Iterator[Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            raise ServerError(_message(error), error.code) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise ServerError(f"{self.root} does not answer: {reason}. Is the server running?") from None


def wait_until_up(client: Client, within_s: float, period_s: float = 0.2) -> bool:
    """Whether the server is healthy before the time is over."""
    deadline = time.monotonic() + within_s
    while not client.is_up():
        if time.monotonic() > deadline:
            return False
        time.sleep(period_s)
    return True


def _key_of_environment(is_local: bool) -> str | None:
    if not is_local:
        return settings.variable("OPENAI_API_KEY")
    keys = [key.strip() for key in (settings.variable(settings.API_KEYS) or "").split(",")]
    return next((key for key in keys if key), None)


def _json(data: bytes, root: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise ServerError(f"{root} sent what is no JSON: is it an OpenAI-compatible server?") from None


def _piece(event: Any) -> Piece:
    if not isinstance(event, dict):
        return Piece()
    if "error" in event:
        raise ServerError(_error_text(event["error"]))
    usage = event.get("usage")
    num_tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return Piece(delta.get("content") or "", reasoning, choices[0].get("finish_reason"), num_tokens)


def _message(error: urllib.error.HTTPError) -> str:
    """What the body of an HTTP error says; its status without a message."""
    try:
        content = json.loads(error.read(_MAX_ERROR_BYTES))
    except (OSError, ValueError):
        content = None
    text = _error_text(content.get("error")) if isinstance(content, dict) else ""
    hint = " Give --api-key, or set MAX_RAY_API_KEYS." if error.code == 401 else ""
    return (text or f"The server answered with HTTP status {error.code}.") + hint


def _error_text(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""
