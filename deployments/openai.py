"""The OpenAI API's requests, as typed models, and how a bad one is explained.

`CompletionRequest` and `ChatCompletionRequest` are what HTTP bodies become and what a Python handle takes. Types are
strict (no "0.5" for 0.5), an unknown field is an error, and `null` means not given. Ranges of sampling parameters
are checked by `SamplingParams`, once for all ways in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator

from max_ray.errors import InputError, nearest

MAX_CHOICES = 128
MAX_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16
Prompt = str | list[str] | list[int] | list[list[int]]

# Fields of the OpenAI API that this server does not act on: named apart from typing mistakes.
_UNSUPPORTED = frozenset(
    [
        "audio",
        "best_of",
        "function_call",
        "functions",
        "logit_bias",
        "metadata",
        "modalities",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "service_tier",
        "store",
        "suffix",
        "tool_choice",
        "tools",
        "user",
        "verbosity",
        "web_search_options",
    ]
)


def _tag(if_text: str, otherwise: str) -> Discriminator:
    return Discriminator(lambda value: if_text if isinstance(value, str) else otherwise)


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """A checked request of either kind: what the generation needs, and nothing of HTTP.

    Exactly one of `prompts` and `messages` is filled. `sampling`: only what the user gave, by our names. `n`: choices
    a prompt. `logprobs`: alternatives per token, None for no log probabilities. `discard_output`: only the prompt is
    wanted back (`max_tokens=0` with `echo`).
    """

    prompts: Sequence[str | list[int]] = ()
    messages: Sequence[Mapping[str, Any]] = ()
    sampling: Mapping[str, Any]
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    discard_output: bool = False


class StrictModel(BaseModel):
    """Base of all requests and their parts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(StrictModel):
    include_usage: bool | None = None


class GenerationRequest(StrictModel):
    """The fields that both kinds of request have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: (
        Annotated[Annotated[str, Tag("<one>")] | Annotated[list[str], Tag("<several>")], _tag("<one>", "<several>")]
        | None
    ) = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=128)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > 16:
            raise ValueError("at most 16 stop strings are supported")
        if not all(strings):
            raise ValueError("a stop string must not be empty")
        return stop

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raises InputError where fields contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise InputError("stream_options has a meaning only with stream=true.", param="stream_options")

    def sampling(self, max_new_tokens: int | None) -> dict[str, Any]:
        """Sampling parameters by our names; None where not given."""
        names = [
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "seed",
            "ignore_eos",
            "stop_token_ids",
        ]
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        given = {name: getattr(self, name) for name in names}
        return given | {"stop": stop, "min_new_tokens": self.min_tokens, "max_new_tokens": max_new_tokens}


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. `max_tokens` is an upper limit: the model's length may end the text before it."""

    prompt: Prompt
    max_tokens: int = Field(default=DEFAULT_COMPLETION_TOKENS, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @field_validator("prompt", mode="plain")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and is_prompt_list(prompt)):
            return prompt
        raise ValueError(
            "must be a text, a list of texts, a list of token ids or a list of such lists; none of them empty"
        )

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)

    def job(self) -> GenerationJob:
        """Raises InputError where fields contradict each other or too many choices are asked for."""
        self.check()
        if self.max_tokens == 0 and not self.echo:
            raise InputError("max_tokens must be at least 1, or 0 together with echo=true.", param="max_tokens")
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise InputError(
                f"{len(self.prompts)} prompts of {self.n} choices each are more than {MAX_CHOICES} choices in one "
                f"request. Send several requests.",
                param="n" if self.n > 1 else "prompt",
            )
        return GenerationJob(
            prompts=self.prompts,
            sampling=self.sampling(max(1, self.max_tokens)),
            n=self.n,
            logprobs=self.logprobs,
            echo=self.echo,
            discard_output=self.max_tokens == 0,
        )


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class ImageUrl(StrictModel):
    url: str
    detail: Literal["auto"] | None = None


class ImagePart(StrictModel):
    """An image; what its URL may be is the tokenizer's matter (`max_ray.images`)."""

    type: Literal["image_url"]
    image_url: ImageUrl


class UnknownPart(BaseModel):
    """Every other part: refused."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: Any

    @field_validator("type")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        hint = " (send single frames of a video as images)" if value in ("video", "video_url") else ""
        raise ValueError(f"content parts are 'text' and 'image_url', not {str(value)[:40]!r}{hint}")


def _part_tag(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return {"text": "<text>", "image_url": "<image>"}.get(kind if isinstance(kind, str) else "", "<unknown>")


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image>")]
    | Annotated[UnknownPart, Tag("<unknown>")],
    Discriminator(_part_tag),
]


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<parts>")], _tag("<text>", "<parts>")
    ]
    name: str | None = None


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`. Without a limit the answer may fill the model's length."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    def job(self) -> GenerationJob:
        """Raises InputError where fields contradict each other."""
        self.check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs has a meaning only with logprobs=true.", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InputError("max_tokens and max_completion_tokens differ: give one of them.", param="max_tokens")
        return GenerationJob(
            messages=[message.model_dump(exclude_none=True) for message in self.messages],
            sampling=self.sampling(limits.pop() if limits else None),
            n=self.n,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


RequestT = TypeVar("RequestT", bound=StrictModel)


def parse_request(kind: type[RequestT], body: bytes) -> RequestT:
    """An HTTP body as a request. Raises InputError that names the field at fault."""
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"The body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError('The body must be a JSON object, such as {"model": ..., "prompt": ...}.')
    for key in content:
        if not key.isascii():  # pydantic cannot name a field with a lone surrogate in it
            raise InputError(f"Unknown field {key!a}.", param=ascii(key)[1:-1])
    known = _UNSUPPORTED | set(kind.model_fields)
    given = {key: value for key, value in content.items() if value is not None or key not in known}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _explain(error, sorted(kind.model_fields)) from None


def is_prompt_list(prompt: list[Any]) -> bool:
    """A list of texts, of ids, or of non-empty lists of ids; not a mixture. (`True` is not an id.)"""
    if isinstance(prompt[0], list):
        return all(isinstance(p, list) and p and all(type(i) is int for i in p) for p in prompt)
    return all(type(p) is str for p in prompt) or all(type(p) is int for p in prompt)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _explain(error: ValidationError, known: Sequence[str]) -> InputError:
    """One readable sentence a mistake (three at most); `param` is the first one's field."""
    problems = error.errors(include_url=False, include_context=False)
    sentences = [_sentence(p["type"], _place(p["loc"]), p["msg"], known) for p in problems[:3]]
    return InputError(" ".join(sentences), param=_place(problems[0]["loc"]) or None)


def _place(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].type`: the path of a field, without the <tags> of union branches."""
    place = ""
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.startswith("<"):
            place += f".{part}" if place else str(part)
    return place


def _sentence(kind: str, place: str, message: str, known: Sequence[str]) -> str:
    if kind == "missing":
        return f"The field {place!r} is required."
    if kind == "extra_forbidden":
        if place in _UNSUPPORTED:
            return f"The field {place!r} is not supported by this server. Leave it out."
        return f"Unknown field {place!r}.{nearest(place, known)}"
    return f"The field {place!r} is not valid: {message.removeprefix('Value error, ')}."
