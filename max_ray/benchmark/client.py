"""Sends one request and notes when each read came. Nothing is parsed here, so the client takes little time of its own.

Every request has its own connection: opening it is part of the time to the first token, and no request meets a
connection that the server is about to close.

What it costs (measured on a shared x86 core, against a server that answers at once): 1.3 ms of CPU a request, 30 us a
read. So requests sent in the same instant wait for one another, with every server: 32 at once saw their first text
after 12 to 18 ms at the median, the scripted server's own time included.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from max_ray.errors import ConfigError, MaxRayError

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_MAX_MESSAGE = 300


@dataclass(frozen=True)
class Failure:
    """`kind` is what failures are counted by: `http_429`, `connect`, `reset`, `truncated`, `timeout`, ..."""

    kind: str
    message: str


@dataclass(slots=True)
class Recording:
    """What came over the wire, unparsed. Times are seconds of `perf_counter`.

    due: when the request should have gone out; start: when it did; end: when the last byte (or the error) came.
    times[i]: when reads[i] came.
    """

    due: float
    output_len: int
    start: float = 0.0
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    reads: list[bytes] = field(default_factory=list)
    failure: Failure | None = None


class Client:
    """Requests to one server; an async context manager.

    timeout_s: of one whole request. Raises ConfigError for a URL that is not http(s) or carries a password.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self.base_url = normal_url(base_url)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, headers=self._headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.close()

    async def first_model(self) -> str:
        """The first model that the server lists. Raises MaxRayError when it lists none."""
        url = f"{self.base_url}/v1/models"
        try:
            async with self._open.get(url) as response:
                listed = json.loads(await response.read()).get("data") if response.status == 200 else response.status
        except (aiohttp.ClientError, OSError, ValueError, AttributeError) as error:
            raise MaxRayError(f"{url} gives no list of models ({error!r}). Is the server up? Or say --model.") from None
        if not isinstance(listed, list) or not listed:
            raise MaxRayError(f"{url} gives no list of models (got {listed!r}). Say --model.")
        return str(listed[0]["id"])

    async def post(self, endpoint: str, body: dict[str, Any], due: float) -> Recording:
        """Sends and reads to the end; failures are in the recording. `endpoint` is a key of ENDPOINTS."""
        recording = Recording(due, body["max_tokens"])
        data = json.dumps(body).encode()
        recording.start = perf_counter()
        try:
            await self._post(self.base_url + ENDPOINTS[endpoint], data, recording)
        except (aiohttp.ClientError, OSError) as error:
            recording.failure = _describe(error)
        recording.end = perf_counter()
        return recording

    async def _post(self, url: str, data: bytes, recording: Recording) -> None:
        headers = {"Content-Type": "application/json"}
        async with self._open.post(url, data=data, headers=headers, allow_redirects=False) as response:
            await _record(response, recording)

    async def read_on(self, path: str, recording: Recording) -> None:
        """Adds the stream at a path to a recording. A failure is in the recording.

        Args:
            path: Behind the server's root.
            recording: Its failure is replaced.
        """
        recording.failure = None
        try:
            async with self._open.get(self.base_url + path, allow_redirects=False) as response:
                await _record(response, recording)
        except (aiohttp.ClientError, OSError) as error:
            recording.failure = _describe(error)
        recording.end = perf_counter()

    @property
    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the client is used outside `async with`"
        return self._session


async def _record(response: aiohttp.ClientResponse, recording: Recording) -> None:
    if response.status != 200:
        text = (await response.text(errors="replace"))[:_MAX_MESSAGE]
        recording.failure = Failure(f"http_{response.status}", text)
        return
    note_time, note_read = recording.times.append, recording.reads.append
    async for data in response.content.iter_any():
        note_time(perf_counter())
        note_read(data)


def normal_url(base_url: str) -> str:
    """The server's root: no slash and no /v1 at the end."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--base-url must look like http://host:port, not {base_url!r}.")
    if parts.password or parts.username:
        raise ConfigError("--base-url must not carry a user or password: it would end up in the results.")
    return base_url.rstrip("/").removesuffix("/v1")


def _describe(error: Exception) -> Failure:
    message = f"{type(error).__name__}: {error}"[:_MAX_MESSAGE]
    if isinstance(error, TimeoutError):
        return Failure("timeout", message)
    if isinstance(error, aiohttp.ClientConnectorError):
        return Failure("connect", message)
    if isinstance(error, aiohttp.ClientPayloadError):  # names in its text only what ended the connection
        return Failure("reset" if ConnectionResetError.__name__ in message else "truncated", message)
    is_reset = isinstance(error, (aiohttp.ClientConnectionError, ConnectionError))
    return Failure("reset" if is_reset else "protocol", message)
