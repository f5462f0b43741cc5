"""Answers of the Responses API."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

ItemStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(TypedDict):
    """Text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningContent(TypedDict):
    """Text of the model's thoughts."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(TypedDict):
    """A message of the model."""

    id: str
    status: ItemStatus
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(TypedDict):
    """What the model thought."""

    id: str
    status: ItemStatus
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ReasoningContent]


class OutputCall(TypedDict):
    """A call that the model made. The arguments are JSON text."""

    id: str
    status: ItemStatus
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class ResponseError(TypedDict):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class InputTokensDetails(TypedDict):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    """What the answer's tokens are."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class EchoedReasoning(TypedDict):
    """The request's settings of reasoning."""

    effort: str | None
    summary: None


class EchoedText(TypedDict):
    """The request's settings of the text."""

    format: dict[str, Any]
    verbosity: str | None


class ResponseObject(TypedDict):
    """A response. The fields from `background` on repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: NotRequired[int | None]
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage | None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: EchoedReasoning
    store: bool
    text: EchoedText
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    truncation: Literal["auto", "disabled"]
    temperature: float
    top_p: float
    service_tier: Literal["default"]
    user: NotRequired[str]
    safety_identifier: NotRequired[str]
    prompt_cache_key: NotRequired[str]


class DeletedResponse(TypedDict):
    """A response that is no more."""

    id: str
    object: Literal["response"]
    deleted: bool
