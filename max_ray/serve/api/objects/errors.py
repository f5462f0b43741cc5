"""Error objects, by dialect."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict


class ErrorDetail(TypedDict):
    """What went wrong. `param` is the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(TypedDict):
    """An error of OpenAI's API."""

    error: ErrorDetail


class AnthropicErrorDetail(TypedDict):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorObject(TypedDict):
    """An error of Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class OllamaErrorObject(TypedDict):
    """An error of Ollama's API."""

    error: str
