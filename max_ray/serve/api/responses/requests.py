"""The request of `POST /v1/responses`, and the chat request that it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag, TypeAdapter

from max_ray.errors import InputError
from max_ray.serve.api.chat_messages import MAX_MESSAGES
from max_ray.serve.api.dialect import DialectFormat, DialectRequest, Places, Translated, translated
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.generation import Generation
from max_ray.serve.api.openai import ChatCompletionRequest, LabelledRequest
from max_ray.serve.api.request_fields import FieldProblem, Neutral, StrictModel, foreign, only, raise_problems, ranged
from max_ray.serve.api.responses.format import ResponseFormat
from max_ray.serve.api.responses.items import Item, chat_of, string_or_list

MAX_TOOLS = 1024
_NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
_CHAT = "Use /v1/chat/completions, which has it."


def _is_count(given: Any, _: Mapping[str, Any]) -> bool:
    return type(given) is int and given > 0


class FunctionTool(StrictModel):
    """A function of the client."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {
        "async": only(False),
        "defer_loading": only(False),
        "allowed_callers": only(["direct"]),
        "output_schema": only(),
    }

    type: Literal["function"]
    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None

    def tool(self) -> dict[str, Any]:
        """The entry of a chat's `tools`."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedFunction(StrictModel):
    """The function that is to be called."""

    type: Literal["function"]
    name: str


def _format_tag(given: Any) -> str:
    kind = given.get("type") if isinstance(given, dict) else None
    return "<schema>" if kind == "json_schema" else "<other>"


class PlainFormat(StrictModel):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]

    def response_format(self) -> dict[str, Any] | None:
        """A chat's `response_format`."""
        return {"type": "json_object"} if self.type == "json_object" else None


class SchemaFormat(StrictModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None

    def response_format(self) -> dict[str, Any] | None:
        """A chat's `response_format`."""
        inner = self.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        return {"type": "json_schema", "json_schema": inner}


class TextOptions(StrictModel):
    """What the text should be like."""

    format: (
        Annotated[
            Annotated[PlainFormat, Tag("<other>")] | Annotated[SchemaFormat, Tag("<schema>")],
            Discriminator(_format_tag),
        ]
        | None
    ) = None
    verbosity: str | None = None


class ReasoningOptions(StrictModel):
    """How much the model thinks. Its thoughts come as they are: there are no summaries."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {
        "summary": only("auto"),
        "generate_summary": only("auto"),
        "encrypted_content": only(),
        "mode": only("standard"),
        "context": only("auto"),
    }

    effort: str | None = None


class ResponseStreamOptions(StrictModel):
    """Nothing in it changes a stream here."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {"include_obfuscation": only(False)}


def _tool_tag(tool: Any) -> str:
    return "<function>" if isinstance(tool, dict) and tool.get("type") == "function" else "<other>"


def _refuse_tool(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    shown = ascii(str(kind)[:40])
    sentence = f"tools are functions of the client, and not {shown}: this server runs none itself."
    raise_problems([FieldProblem("type", lambda place: f"The field '{place}' is not valid: {sentence}")])


Tool = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[Any, PlainValidator(_refuse_tool), Tag("<other>")],
    Discriminator(_tool_tag),
]
Items = Annotated[list[Item], Field(max_length=MAX_MESSAGES, fail_fast=True)]
ITEMS: TypeAdapter[list[Any]] = TypeAdapter(Items)
"""Reads items that were stored."""


class ResponsesRequest(LabelledRequest, DialectRequest):
    """The body. With `previous_response_id` the conversation goes on; `instructions` are of this response alone."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {
        "background_options": only(),
        "context_management": only([]),
        "conversation": only(),
        "include": only([]),
        "max_tool_calls": Neutral(
            _is_count,
            "a number: it counts calls of tools that a server runs",
            schema={"type": ["integer", "null"], "minimum": 1},
        ),
        "moderation": only(),
        "prompt": only(),
        "prompt_cache_options": only(),
        "prompt_cache_retention": only("in_memory"),
        "service_tier": only("auto", "default"),
        "stream_options": only({}, {"include_obfuscation": False}),
        "top_logprobs": only(0, instead=_CHAT),
        "extra_body": foreign({}),
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {
        "max_completion_tokens": "Use 'max_output_tokens'.",
        "max_tokens": "Use 'max_output_tokens'.",
        "messages": "Use 'input'.",
        "n": _CHAT,
        "response_format": "Use 'text.format'.",
        "reasoning_effort": "Use 'reasoning.effort'.",
        "stop": _CHAT,
        "system": "Use 'instructions'.",
    }

    input: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[Items, Field(min_length=1), Tag("<list>")],
        Discriminator(string_or_list),
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    background: bool = False
    stream: bool = False
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = ranged(minimum=0)
    top_p: float | None = ranged(exclusiveMinimum=0, maximum=1)
    top_k: int | None = ranged(minimum=-1)
    seed: int | None = ranged(minimum=-(2**63), maximum=2**64 - 1)
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<string>")] | Annotated[NamedFunction, Tag("<list>")],
            Discriminator(string_or_list),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] = "disabled"

    @property
    def is_streamed(self) -> bool:
        return self.stream

    def translate(self) -> Translated:
        """Without the previous responses: what refuses a hopeless body needs them not."""
        return self.continuing(())

    def continuing(self, history: Sequence[Any], num_dropped: int = 0) -> Translated:
        """The chat request behind these items of previous responses.

        Args:
            history: Items of previous responses, in order.
            num_dropped: Messages to leave out at the beginning, as `truncation` allows.

        Raises:
            InputError: In this dialect's words.
        """
        before, before_places = chat_of(history, "previous_response_id: item ")
        own, own_places = self._own_chat()
        chat, places = [*before, *own][num_dropped:], [*before_places, *own_places][num_dropped:]
        while chat and num_dropped and chat[0]["role"] == "tool":  # its call was left out
            chat, places = chat[1:], places[1:]
        if self.instructions is not None:
            chat, places = [{"role": "system", "content": self.instructions}, *chat], ["instructions", *places]
        return translated(ChatCompletionRequest, {"messages": chat, **self._fields()}, Places(places, _NAMES))

    def num_messages(self, history: Sequence[Any]) -> int:
        """Messages of the chat that may be left out, and one that may not."""
        return len(chat_of(history, "")[0]) + len(self._own_chat()[0])

    def check(self) -> None:
        """Raises InputError where fields contradict each other."""
        if self.background and not self.store:
            raise InputError("A background response is stored: leave out store=false.", param="store")
        if self.background and self.stream:
            raise InputError(
                "A background response is not streamed here: leave out stream, and ask with GET how it goes.",
                param="stream",
            )

    def formatter(self, engine: Engine, generation: Generation) -> DialectFormat:
        return ResponseFormat(engine.model_name, generation, self.echoed())

    def echoed(self) -> dict[str, Any]:
        """The fields of the request that the response repeats."""
        text = self.text or TextOptions()
        given = text.format.model_dump(exclude_none=True, by_alias=True) if text.format else {"type": "text"}
        choice = self.tool_choice
        return {
            "background": self.background,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "store": self.store,
            "text": {"format": given, "verbosity": text.verbosity},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "top_logprobs": 0,
            "truncation": self.truncation,
            **self.labels,
        }

    def _own_chat(self) -> tuple[list[dict[str, Any]], list[str]]:
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}], ["input"]
        return chat_of(self.input, "input")

    def _fields(self) -> dict[str, Any]:
        """The chat request's fields besides its messages."""
        text, choice = self.text or TextOptions(), self.tool_choice
        named = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedFunction) else choice
        return {
            "model": self.model,
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "response_format": text.format.response_format() if text.format else None,
            "verbosity": text.verbosity,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "tools": [tool.tool() for tool in self.tools] if self.tools else None,
            "tool_choice": named,
            "parallel_tool_calls": self.parallel_tool_calls,
            **self.labels,
        }
