"""The generating requests of Ollama's API, and the chat or completion requests that they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from max_ray.errors import InputError
from max_ray.interfaces import SamplingParams
from max_ray.interfaces.logit_controls import MAX_WINDOW, LogitControls
from max_ray.serve.api.chat_messages import MAX_MESSAGES
from max_ray.serve.api.dialect import DialectFormat, DialectRequest, Places, Translated, translated
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.extension_fields import ShortText
from max_ray.serve.api.generation import Generation
from max_ray.serve.api.ollama.format import ChatLines, GenerateLines
from max_ray.serve.api.ollama.messages import MAX_IMAGES, OllamaMessage, chat_of, content_of
from max_ray.serve.api.ollama.options import KEEP_ALIVE_SCHEMA, Options, checked_keep_alive, model_name
from max_ray.serve.api.openai import ChatCompletionRequest, CompletionRequest
from max_ray.serve.api.request_fields import Neutral, only
from max_ray.serve.api.tool_fields import MAX_TOOLS

_LOGPROBS = "Use /v1/chat/completions, which has them."
_NAMES = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "reasoning_effort": "think",
    "response_format": "format",
    **{
        name: f"options.{name}"
        for name in (
            *("temperature", "top_k", "top_p", "min_p", "seed", "stop"),
            *("presence_penalty", "frequency_penalty"),
        )
    },
}
KeepAlive = Annotated[Any, PlainValidator(checked_keep_alive), WithJsonSchema(KEEP_ALIVE_SCHEMA)]


def _think_tag(value: Any) -> str:
    return "<bool>" if isinstance(value, bool) else "<level>"


def _format_tag(value: Any) -> str:
    return "<word>" if isinstance(value, str) else "<schema>"


Think = Annotated[
    Annotated[bool, Tag("<bool>")] | Annotated[Literal["low", "medium", "high"], Tag("<level>")],
    Discriminator(_think_tag),
]
Format = Annotated[
    Annotated[Literal["", "json"], Tag("<word>")] | Annotated[dict[str, Any], Tag("<schema>")],
    Discriminator(_format_tag),
]


class OllamaRequest(DialectRequest):
    """What `/api/chat` and `/api/generate` share. Answers are streamed unless `stream` is false.

    keep_alive: anything but 0 holds, for the model stays loaded. think: whether and how much the model reasons; what it
    thought is apart from the answer. format: "json", or a JSON schema.
    """

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {
        "logprobs": only(False, instead=_LOGPROBS),
        "top_logprobs": only(0, instead=_LOGPROBS),
        "truncate": only(False),
        "shift": only(False),
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {
        name: f"Use 'options.{own}'."
        for name, own in {
            **{name: name for name in Options.model_fields},
            "max_tokens": "num_predict",
            "repetition_penalty": "repeat_penalty",
        }.items()
    }

    model: Annotated[ShortText, BeforeValidator(lambda name: model_name(name) if isinstance(name, str) else name)]
    stream: bool = True
    options: Options | None = None
    format: Format | None = None
    keep_alive: KeepAlive | None = None
    think: Think | None = None

    @property
    def is_streamed(self) -> bool:
        return self.stream

    @property
    @abstractmethod
    def only_loads(self) -> bool:
        """Whether nothing is asked for but that the model is loaded."""

    def refuse_hopeless(self, max_length: int) -> None:
        if not self.only_loads:
            super().refuse_hopeless(max_length)

    def check_sampling(self) -> None:
        """Raises InputError for options out of range, of a request that only wants the model loaded."""
        given = {name: value for name, value in (self.options or Options()).sampling().items() if value is not None}
        limit = given.pop("max_tokens", None)
        own = {name: given.pop(name) for name in ("typical_p", "repeat_last_n") if name in given}
        own["repeat_last_n"] = min(own.get("repeat_last_n", -1), MAX_WINDOW)  # a longer one is the whole text
        translated(CompletionRequest, {"prompt": "", "stop": given.get("stop")}, Places((), _NAMES))
        with Places((), _NAMES).applied():
            SamplingParams(max_new_tokens=limit, logit_controls=LogitControls(**own), **given)

    def shared_fields(self) -> dict[str, Any]:
        """The fields of a chat request besides its messages."""
        effort = {True: None, False: "none"}.get(self.think, self.think) if self.think is not None else None  # type: ignore[arg-type]
        return {
            "model": self.model,
            "response_format": _response_format(self.format),
            "reasoning_effort": effort,
            **(self.options or Options()).sampling(),
        }


_FUNCTION = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": r"^[A-Za-z0-9_.\-]{1,128}$"},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
    },
    "required": ["name"],
}
_Tool = Annotated[  # read as a chat's ToolSpec
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": _FUNCTION},
            "required": ["type", "function"],
            "additionalProperties": False,
        }
    ),
]


class OllamaChatRequest(OllamaRequest):
    """`POST /api/chat`."""

    messages: Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        default_factory=list
    )
    tools: Annotated[list[_Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None

    @property
    def only_loads(self) -> bool:
        return not self.messages

    def translate(self) -> Translated:
        """A chat that ends with the assistant's words is continued there."""
        fields = {**self.shared_fields(), "messages": chat_of(self.messages), "tools": self.tools or None}
        if self.messages[-1].role == "assistant":
            fields["continue_final_message"] = True
        places = [f"messages[{number}]" for number in range(len(self.messages))]
        names = {**_NAMES, "continue_final_message": places[-1]}
        return translated(ChatCompletionRequest, fields, Places(places, names))

    def formatter(self, engine: Engine, generation: Generation) -> DialectFormat:
        return ChatLines(engine.model_name, generation)


class OllamaGenerateRequest(OllamaRequest):
    """`POST /api/generate`. With `raw` the prompt is taken as it is, else it is a user's message."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {
        **OllamaRequest.NEUTRAL,
        "context": only([], instead="Use /api/chat, which takes the conversation."),
        "suffix": only(""),
        "template": only("", instead="The model's own is used; 'raw' uses none."),
        "width": only(0),
        "height": only(0),
        "steps": only(0),
    }

    prompt: str = ""
    system: str | None = None
    raw: bool = False
    images: Annotated[list[str], Field(max_length=MAX_IMAGES, fail_fast=True)] | None = None

    @property
    def only_loads(self) -> bool:
        return not self.prompt and not self.images

    def translate(self) -> Translated:
        if self.raw:
            return self._completion()
        messages = [{"role": "user", "content": content_of(self.prompt, self.images, "")}]
        places = ["prompt"]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
            places.insert(0, "system")
        fields = {**self.shared_fields(), "messages": messages}
        return translated(ChatCompletionRequest, fields, Places(places, {**_NAMES, "messages": "prompt"}))

    def formatter(self, engine: Engine, generation: Generation) -> DialectFormat:
        return GenerateLines(engine.model_name, generation)

    def _completion(self) -> Translated:
        for name in ("system", "images"):
            if getattr(self, name):
                raise InputError(f"{name} has no meaning with raw=true: put all into the prompt.", param=name)
        if self.think is not None:
            raise InputError("think has no meaning with raw=true: the prompt is taken as it is.", param="think")
        fields = {**self.shared_fields(), "prompt": self.prompt}
        if fields["max_tokens"] is None:  # a completion's own default is 16
            fields["max_tokens"] = 2**31 - 1
        return translated(CompletionRequest, fields, Places((), _NAMES))


def _response_format(wanted: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not wanted:
        return None
    if wanted == "json":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": wanted, "strict": True}}
