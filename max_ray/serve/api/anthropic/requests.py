"""The requests of Anthropic's API, as typed models, and the chat requests that they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from max_ray.errors import InputError
from max_ray.serve.api.anthropic.blocks import (
    Block,
    Content,
    ImageBlock,
    System,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from max_ray.serve.api.anthropic.format import MessageFormat
from max_ray.serve.api.chat_messages import MAX_MESSAGES
from max_ray.serve.api.dialect import DialectFormat, DialectRequest, Places, Translated, translated
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.extension_fields import ShortText
from max_ray.serve.api.generation import Generation
from max_ray.serve.api.neutral_fields import CACHE_CONTROL
from max_ray.serve.api.openai import ChatCompletionRequest, StopText
from max_ray.serve.api.request_fields import Neutral, StrictModel, only, ranged

MAX_TOOLS = 1024
_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "user": "metadata.user_id",
    "thinking_token_budget": "thinking.budget_tokens",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


_KEEPS_ALL = {"type": "clear_thinking_20251015", "keep": "all"}


def _keeps_all(given: Any, _: Mapping[str, Any]) -> bool:
    """Edits of the conversation, none of which takes anything away."""
    if not isinstance(given, dict) or given.keys() - {"edits"}:
        return False
    return isinstance(given.get("edits", []), list) and all(edit == _KEEPS_ALL for edit in given.get("edits", []))


_ANY: dict[str, Neutral] = {
    "cache_control": CACHE_CONTROL,
    "container": only(),
    "context_management": Neutral(
        _keeps_all,
        '{"edits": []}',
        schema={
            "type": ["object", "null"],
            "properties": {"edits": {"type": "array", "items": {"const": _KEEPS_ALL}}},
            "additionalProperties": False,
        },
    ),
    "diagnostics": only(),
    "inference_geo": only(),
    "mcp_servers": only([]),
    "service_tier": only("auto", "standard_only"),
    "speed": only("standard"),
    "user_profile_id": only(),
    "workspace_id": only(),
}
_INSTEAD = {
    "max_completion_tokens": "Use 'max_tokens'.",
    "response_format": "Use 'output_config.format'.",
    "stop": "Use 'stop_sequences'.",
    "user": "Use 'metadata.user_id'.",
}


class AnthropicMessage(StrictModel):
    """One turn. Of the assistant it is text, thinking and calls; of the user text, images and results."""

    role: Literal["user", "assistant", "system"]
    content: Content

    def messages(self) -> list[dict[str, Any]]:
        """The chat messages that it is."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        if self.role == "assistant":
            return [_assistant_message(self.content)]
        results = [block.message() for block in self.content if isinstance(block, ToolResultBlock)]
        parts = _parts(self.content, (ToolUseBlock, ThinkingBlock), self.role)
        return [*results, {"role": self.role, "content": parts}] if parts or not results else results


class Tool(StrictModel):
    """A function of the client. Tools that a server runs (`web_search_20250305`) are refused: this one runs none."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {
        "cache_control": CACHE_CONTROL,
        "allowed_callers": only(["direct"]),
        "eager_input_streaming": only(True),
        "input_examples": only([]),
    }

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    defer_loading: bool = False
    type: Literal["custom"] = "custom"

    def tool(self) -> dict[str, Any]:
        """The entry of a chat's `tools`."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": _given({**function, "strict": self.strict})}


class ToolChoice(StrictModel):
    """`auto`, `any`, `none`, or the `tool` of a name."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def choice(self) -> Any:
        """A chat's `tool_choice`. Raises InputError for a tool without a name."""
        if (self.type == "tool") != (self.name is not None):
            raise InputError("tool_choice has a name exactly when its type is 'tool'.", param="tool_choice.name")
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Metadata(StrictModel):
    """A label."""

    user_id: ShortText | None = None


class OutputFormat(StrictModel):
    """A JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")

    def response_format(self) -> dict[str, Any]:
        """A chat's `response_format`."""
        return {"type": "json_schema", "json_schema": {"name": "output", "schema": self.schema_, "strict": True}}


class OutputConfig(StrictModel):
    """What the answer should be like."""

    effort: str | None = None
    format: OutputFormat | None = None


class Thinking(StrictModel):
    """`enabled` bounds it by `budget_tokens`, `adaptive` leaves it to the model, `disabled` turns it off where the
    model's template can.

    With the display `omitted` the answer has no thinking blocks; `summarized` shows all of the reasoning.
    """

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized", "omitted"] = "summarized"

    def budget(self) -> int | None:
        """Tokens of reasoning. Raises InputError where the type and the budget contradict each other."""
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise InputError(
                "thinking has budget_tokens exactly when its type is 'enabled'.", param="thinking.budget_tokens"
            )
        return self.budget_tokens


class _Chat(ChatCompletionRequest):
    """A chat whose default effort is Anthropic's."""

    DEFAULT_EFFORTS: ClassVar[Mapping[str, str]] = {**ChatCompletionRequest.DEFAULT_EFFORTS, "reasoning_effort": "high"}


class CountTokensRequest(DialectRequest):
    """`POST /v1/messages/count_tokens`: everything of a message that makes its prompt."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = _ANY
    INSTEAD: ClassVar[Mapping[str, str]] = _INSTEAD

    model: ShortText | None = None
    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    system: System | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    @property
    def is_streamed(self) -> bool:
        return False

    def translate(self) -> Translated:
        """A chat that ends with the assistant's words is continued there."""
        messages, places = self._chat()
        fields = {"model": self.model, "messages": messages, **self._tools(), **self._output(), **self._sampling()}
        if self.messages[-1].role == "assistant":
            fields["continue_final_message"] = True
        names = {**_NAMES, "continue_final_message": f"messages[{len(self.messages) - 1}]"}
        return translated(_Chat, fields, Places(places, names))

    def formatter(self, engine: Engine, generation: Generation) -> DialectFormat:
        return MessageFormat(engine.model_name, generation)

    def _chat(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The chat, and where each message came from. Neighbours of one role are one message, as Anthropic says."""
        chat: list[dict[str, Any]] = []
        places: list[str] = []
        if self.system:
            system = self.system if isinstance(self.system, str) else [block.part() for block in self.system]
            chat.append({"role": "system", "content": system})
            places.append("system")
        for number, message in enumerate(self.messages):
            for one in message.messages():
                if chat and places[-1] != "system" and _can_join(chat[-1], one):
                    chat[-1]["content"] = _as_parts(chat[-1]["content"])
                    chat[-1]["content"] += _as_parts(one["content"])
                else:
                    chat.append(one)
                    places.append(f"messages[{number}]")
        return chat, places

    def _tools(self) -> dict[str, Any]:
        choice = self.tool_choice
        fields: dict[str, Any] = {"tools": [tool.tool() for tool in self._offered_tools()] or None}
        if choice is None:
            return fields
        parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
        return fields | {"tool_choice": choice.choice(), "parallel_tool_calls": parallel}

    def _offered_tools(self) -> list[Tool]:
        """Tools with `defer_loading` are offered once a tool result refers to them."""
        blocks = (block for message in self.messages if isinstance(message.content, list) for block in message.content)
        found = set().union(*(block.found_tools for block in blocks if isinstance(block, ToolResultBlock)))
        return [tool for tool in self.tools or () if not tool.defer_loading or tool.name in found]

    def _output(self) -> dict[str, Any]:
        config = self.output_config or OutputConfig()
        if config.format is not None and self.output_format is not None:
            raise InputError("output_format and output_config.format are the same: give one.", param="output_format")
        wanted = config.format or self.output_format
        is_off = self.thinking is not None and self.thinking.type == "disabled"
        is_omitted = self.thinking is not None and self.thinking.display == "omitted"
        return {
            "reasoning_effort": "none" if is_off else config.effort,
            "thinking_token_budget": None if self.thinking is None else self.thinking.budget(),
            "include_reasoning": False if is_omitted else None,
            "response_format": None if wanted is None else wanted.response_format(),
        }

    def _sampling(self) -> dict[str, Any]:
        """What does not change the prompt."""
        return {}


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`. Ranges of the sampling parameters are those of the other routes."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    temperature: float | None = ranged(minimum=0)
    top_p: float | None = ranged(exclusiveMinimum=0, maximum=1)
    top_k: int | None = ranged(minimum=-1)
    stop_sequences: list[StopText] | None = None
    metadata: Metadata | None = None

    @property
    def is_streamed(self) -> bool:
        return self.stream

    def _sampling(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "user": self.metadata.user_id if self.metadata else None,
        }


def _assistant_message(blocks: list[Block]) -> dict[str, Any]:
    parts = _parts(blocks, (ToolResultBlock, ImageBlock), "assistant")
    calls = [block.call() for block in blocks if isinstance(block, ToolUseBlock)]
    thoughts = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    message = {"role": "assistant", "content": parts or None, "tool_calls": calls or None}
    return _given({**message, "reasoning_content": thoughts or None})


def _parts(blocks: list[Any], refused: tuple[type[Any], ...], role: str) -> list[dict[str, Any]]:
    """The content parts among the blocks. Raises InputError for blocks that this role does not have."""
    wrong = [block.type for block in blocks if isinstance(block, refused)]
    if wrong:
        raise InputError(f"A message of the role {role!r} has no {wrong[0]!r} block.", param="messages")
    return [block.part() for block in blocks if isinstance(block, TextBlock | ImageBlock)]


def _can_join(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    plain = {"role", "content"}
    return first["role"] == second["role"] != "tool" and first.keys() == second.keys() == plain


def _as_parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
