"""All routes of the HTTP API, in one table: what is suggested for an unknown path, counted, open and documented."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

GET = ("GET", "HEAD")
POST = ("POST",)


@dataclass(frozen=True)
class Route:
    """One route.

    Args:
        path: Its template, with parameters in braces. A parameter is one segment, or several as `{name:path}`.
        methods: HTTP methods.
        summary: What it does, in one sentence.
        is_counted: Whether `/metrics` counts its requests.
        is_open: Whether it needs no API key.
    """

    path: str
    methods: tuple[str, ...]
    summary: str
    is_counted: bool = True
    is_open: bool = False

    @property
    def label(self) -> str:
        """The path as metrics name it: `/v1/models/{model}`."""
        return self.path.replace(":path}", "}")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the paths of this route."""
        parts = re.split(r"\{\w+(:path)?\}", self.path)
        text = re.escape(parts[0])
        for kind, part in zip(parts[1::2], parts[2::2], strict=True):
            text += (".+" if kind else "[^/]+") + re.escape(part)
        return re.compile(text, re.DOTALL)


ROUTES = (
    Route("/v1/models", GET, "The served model."),
    Route("/v1/models/{model:path}", GET, "The model, with its length and chat template."),
    Route("/v1/completions", POST, "Continues a prompt (OpenAI)."),
    Route("/v1/chat/completions", POST, "Answers a chat (OpenAI)."),
    Route("/v1/embeddings", POST, "Vectors of texts (OpenAI)."),
    Route("/v1/requests/{answer_id}", GET, "What happened to a request: waits, phases, KV blocks, by its answer's id."),
    Route("/v1/streams/{stream_id}", ("GET", "DELETE"), "Goes on with a resumable stream; DELETE ends it."),
    Route("/v1/score", POST, "Scores of pairs of texts (vLLM)."),
    Route("/score", POST, "The same as /v1/score (vLLM)."),
    Route("/v1/rerank", POST, "Documents in the order of their relevance to a query (Jina)."),
    Route("/rerank", POST, "The same as /v1/rerank (vLLM)."),
    Route("/v2/rerank", POST, "The same as /v1/rerank (Cohere)."),
    Route("/v1/responses", POST, "Answers input items, and keeps the response (OpenAI)."),
    Route("/v1/responses/{response_id}", (*GET, "DELETE"), "A stored response; DELETE forgets it (OpenAI)."),
    Route("/v1/responses/{response_id}/cancel", POST, "Ends a background response (OpenAI)."),
    Route("/v1/responses/{response_id}/input_items", GET, "The input of a stored response (OpenAI)."),
    Route("/v1/files", (*GET, *POST), "Files; POST uploads the input of a batch as a form (OpenAI)."),
    Route("/v1/files/{file_id}", (*GET, "DELETE"), "A file's name and size; DELETE removes it (OpenAI)."),
    Route("/v1/files/{file_id}/content", GET, "The bytes of a file (OpenAI)."),
    Route("/v1/batches", (*GET, *POST), "Batches; POST begins one (OpenAI)."),
    Route("/v1/batches/{batch_id}", GET, "A batch, with its progress (OpenAI)."),
    Route("/v1/batches/{batch_id}/cancel", POST, "Ends a batch (OpenAI)."),
    Route("/v1/messages", POST, "Answers a chat (Anthropic)."),
    Route("/v1/messages/count_tokens", POST, "Tokens of a chat's prompt (Anthropic)."),
    Route("/api/chat", POST, "Answers a chat (Ollama)."),
    Route("/api/generate", POST, "Answers or continues a prompt (Ollama)."),
    Route("/api/embed", POST, "Vectors of texts (Ollama)."),
    Route("/api/tags", GET, "The served model (Ollama)."),
    Route("/api/show", POST, "The model, with its capabilities (Ollama)."),
    Route("/api/ps", GET, "The model, which is always loaded (Ollama)."),
    Route("/api/version", GET, "The version of the server (Ollama)."),
    Route("/tokenize", POST, "Token ids of a prompt or of a chat (vLLM)."),
    Route("/detokenize", POST, "The text of token ids (vLLM)."),
    Route("/tokenizer_info", GET, "Class, special tokens and chat template of the tokenizer (vLLM)."),
    Route("/v1/server", GET, "The running server: replicas, requests, KV blocks.", is_counted=False),
    Route("/health", GET, "200 while the model workers answer, else 503.", is_counted=False, is_open=True),
    Route("/ping", ("GET", "HEAD", "POST"), "The same as /health.", is_counted=False, is_open=True),
    Route("/metrics", GET, "Numbers for Prometheus.", is_counted=False),
    Route("/version", GET, "The version of the server.", is_counted=False),
    Route("/openapi.json", GET, "This API as an OpenAPI document.", is_counted=False, is_open=True),
    Route("/docs", GET, "This API as a web page.", is_counted=False, is_open=True),
    Route("/", GET, "A page to chat and to watch the server.", is_counted=False, is_open=True),
    Route("/page/{name}", GET, "The files of that page.", is_counted=False, is_open=True),
)
OTHER = "other"
"""The label of requests to unknown paths of the API."""
_COUNTED_BEGINNINGS = ("/v1/", "/api/")
_LABELS = {route.label: route for route in ROUTES}
_WITH_PARAMETERS = tuple(route for route in ROUTES if "{" in route.path)
_OPEN_PATHS = frozenset(route.path for route in ROUTES if route.is_open)
_OPEN_WITH_PARAMETERS = tuple(route for route in _WITH_PARAMETERS if route.is_open)


def counted_label(path: str) -> str | None:
    """The label under which metrics count a request: as many labels as routes, whatever clients ask for.

    Args:
        path: The path without a prefix and without a slash at its end.

    Returns:
        The template of the route, `other` for an unknown path of the API, None for what is not counted.
    """
    route = _LABELS.get(path) if "{" not in path else None
    if route is None:
        if not path.startswith(_COUNTED_BEGINNINGS):
            return None
        route = next((route for route in _WITH_PARAMETERS if route.pattern.fullmatch(path)), None)
    if route is None:
        return OTHER
    return route.label if route.is_counted else None


def is_open(path: str) -> bool:
    """Whether a path needs no API key.

    Args:
        path: Without a prefix and without a slash at its end.
    """
    return path in _OPEN_PATHS or any(route.pattern.fullmatch(path) for route in _OPEN_WITH_PARAMETERS)


def allowed_methods(path: str) -> list[str]:
    """The methods of a path, of all routes that it belongs to; empty for an unknown one.

    Args:
        path: Without a prefix and without a slash at its end.
    """
    return list(dict.fromkeys(m for route in ROUTES if route.pattern.fullmatch(path) for m in route.methods))


def known_paths() -> Iterable[str]:
    """Paths to suggest for an unknown one."""
    return [route.path for route in ROUTES if "{" not in route.path]
