"""The OpenAI API's requests, as typed models, and how a bad one is explained.

`CompletionRequest` and `ChatCompletionRequest` are what HTTP bodies become and what a Python handle takes. Types are
strict (no "0.5" for 0.5), an unknown field is an error, and `null` means not given (`request_fields`). Every list is
bounded and is read up to its first mistake. Ranges of sampling parameters are checked by `SamplingParams`, once for
all ways in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Discriminator, Field, PlainValidator, Tag, ValidationError, WithJsonSchema, field_validator

from max_ray.errors import InputError, PromptTooLongError
from max_ray.serve.api.aliases import CHAT_ALIASES, COMPLETION_ALIASES, Alias
from max_ray.serve.api.chat_messages import MAX_MESSAGES, Message, named_results, text_or_list
from max_ray.serve.api.extension_fields import (
    MAX_LABEL_CHARACTERS,
    ExtensionFields,
    PromptOptions,
    ShortText,
    TextOptions,
)
from max_ray.serve.api.json_body import decode_object
from max_ray.serve.api.logit_fields import LogitFields
from max_ray.serve.api.neutral_fields import CHAT, CHAT_INSTEAD, COMPLETION, COMPLETION_INSTEAD, STREAM_OPTIONS
from max_ray.serve.api.request_fields import FIELD_ERROR, MAX_PROBLEMS, ApiRequest, Neutral, StrictModel, ranged
from max_ray.serve.api.structured_output_fields import RESPONSE_FORMAT, StructuredOutputFields
from max_ray.serve.api.tool_fields import ChatOutput, ToolFields

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_CHARACTERS = 4096
DEFAULT_COMPLETION_TOKENS = 16
TOKEN_CHARACTERS = 1024
"""More than any token of any vocabulary has."""
RESUMABLE = "stream_options.resumable"
Prompt = str | list[str] | list[int] | list[list[int]]
_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_LISTS = {"type": "array", "items": _IDS, "minItems": 1}
PromptField = Annotated[Prompt, WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, _LISTS]})]
"""A text or token ids, or a list of one of them."""


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """A checked request of either kind: what the generation needs, and nothing of HTTP.

    Exactly one of `prompts` and `messages` is filled. `sampling`: only what the user gave, by our names. `n`: choices
    a prompt. `logprobs`: alternatives per token, None for no log probabilities. `discard_output`: only the prompt is
    wanted back (`max_tokens=0` with `echo`). `prompt_logprobs`: alternatives per prompt token, None for no report.
    `cache_salt`, `priority`: see TextGenerationRequest. `grammar_field`: the field of the request that gave
    `sampling["structured_output"]`, for errors. `template_options`: variables of the chat template. `efforts`:
    `reasoning_effort` and `verbosity`; `default_efforts`: values of them that pass where a template reads neither.
    `chat`: how the answer to messages is read. `labels`: what the client wrote on its request (`LabelledRequest`).
    `num_returned`: how many of the `n` choices of each prompt are given
    back, the likeliest ones; None for all. `suffix`: the text that follows what is generated.
    """

    prompts: Sequence[str | list[int]] = ()
    messages: Sequence[Mapping[str, Any]] = ()
    sampling: Mapping[str, Any]
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    discard_output: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)
    efforts: Mapping[str, str] = field(default_factory=dict)
    default_efforts: Mapping[str, str] = field(default_factory=dict)
    chat: ChatOutput | None = None
    grammar_field: str = RESPONSE_FORMAT
    labels: Mapping[str, Any] = field(default_factory=dict)
    num_returned: int | None = None
    suffix: str | None = None
    prompt_options: PromptOptions = field(default_factory=PromptOptions)
    text_options: TextOptions = field(default_factory=TextOptions)
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    priority: int = 0

    @property
    def reported_logprobs(self) -> int | None:
        """Alternatives that the engine reports for each token: those of the text and of the prompt are one number."""
        of_ranking = None if self.num_returned is None else 0
        given = [n for n in (self.logprobs, self.prompt_logprobs, of_ranking) if n is not None]
        return max(given, default=None)


class StreamOptions(StrictModel):
    NEUTRAL: ClassVar[Mapping[str, Neutral]] = STREAM_OPTIONS

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    resumable: bool | None = None


def _metadata(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) > 16:
        raise ValueError("it must be an object of at most 16 texts")
    if not all(isinstance(text, str) and len(text) <= MAX_LABEL_CHARACTERS for pair in value.items() for text in pair):
        raise ValueError(f"its keys and values must be texts of at most {MAX_LABEL_CHARACTERS} characters")
    return value


_LABEL = {"type": "string", "maxLength": MAX_LABEL_CHARACTERS}
_METADATA_SCHEMA = WithJsonSchema(
    {"type": "object", "maxProperties": 16, "propertyNames": _LABEL, "additionalProperties": _LABEL}
)


class LabelledRequest(ApiRequest):
    """Labels: what a client writes on its request for accounts and logs. They change nothing in the answer."""

    model: ShortText | None = None
    user: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    metadata: Annotated[dict[str, str], PlainValidator(_metadata), _METADATA_SCHEMA] | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """Those that are given."""
        names = ("user", "safety_identifier", "prompt_cache_key", "metadata")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


StopText = Annotated[
    str, WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS})
]  # checked by `_check_stop`


class GenerationRequest(ExtensionFields, StructuredOutputFields, LogitFields, LabelledRequest):
    """The fields that both kinds of request have."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float | None = ranged(minimum=0)
    top_p: float | None = ranged(exclusiveMinimum=0, maximum=1)
    top_k: int | None = ranged(minimum=-1)
    min_p: float | None = ranged(minimum=0, maximum=1)
    frequency_penalty: float | None = ranged(minimum=-2, maximum=2)
    presence_penalty: float | None = ranged(minimum=-2, maximum=2)
    repetition_penalty: float | None = ranged(exclusiveMinimum=0)
    seed: int | None = ranged(minimum=-(2**63), maximum=2**64 - 1)
    stop: (
        Annotated[
            Annotated[StopText, Tag("<text>")]
            | Annotated[list[StopText], Field(max_length=16, fail_fast=True), Tag("<list>")],
            Discriminator(text_or_list),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[int], Field(max_length=128, fail_fast=True)] | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if not all(strings):
            raise ValueError("a stop string must not be empty")
        if any(len(string) > MAX_STOP_CHARACTERS for string in strings):
            raise ValueError(f"a stop string may have {MAX_STOP_CHARACTERS} characters at most")
        return stop

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk has the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def is_resumable(self) -> bool:
        """Whether the stream may be read on over another connection."""
        return bool(self.stream_options and self.stream_options.resumable)

    def check(self) -> None:
        """Raises InputError where fields contradict each other."""
        if self.is_resumable and not self.stream:
            raise InputError("stream_options.resumable has a meaning only with stream=true.", param=RESUMABLE)
        if self.include_usage and not self.stream:
            raise InputError("stream_options has a meaning only with stream=true.", param="stream_options")
        if self.continuous_usage and not self.include_usage:
            raise InputError(
                "stream_options.continuous_usage_stats has a meaning only with include_usage=true.",
                param="stream_options.continuous_usage_stats",
            )
        self.check_extensions()
        if self.prompt_logprobs is not None and self.stream:
            raise InputError("prompt_logprobs are given in whole answers only: leave stream out.", param="stream")

    @property
    def grammar_field(self) -> str:
        """The field that asks for structured output."""
        return RESPONSE_FORMAT if self.structured_output is None else self.structured_output[1]

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
        if self.structured_output is not None:
            given["structured_output"] = self.structured_output[0]
        given |= self.logit_sampling()
        return given | {"stop": stop, "min_new_tokens": self.min_tokens, "max_new_tokens": max_new_tokens}


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. `max_tokens` is an upper limit: the model's length may end the text before it."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = COMPLETION
    INSTEAD: ClassVar[Mapping[str, str]] = COMPLETION_INSTEAD
    ALIASES: ClassVar[Mapping[str, Alias]] = COMPLETION_ALIASES

    prompt: PromptField
    max_tokens: int = Field(default=DEFAULT_COMPLETION_TOKENS, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    suffix: str | None = None
    add_special_tokens: bool = True

    @field_validator("prompt", mode="plain")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        return checked_prompt(prompt)

    @property
    def prompts(self) -> list[str | list[int]]:
        return prompts_of(self.prompt)

    @property
    def num_items(self) -> int:
        """Of the request's longest list: what work on it grows with."""
        return 1 if isinstance(self.prompt, str) else len(self.prompt)

    def refuse_hopeless(self, max_length: int) -> None:
        for prompt in self.prompts if self.truncate_prompt_tokens is None else ():
            refuse_at_least(least_tokens(prompt), max_length, "prompt")

    def job(self) -> GenerationJob:
        """Raises InputError where fields contradict each other or too many choices are asked for."""
        self.check()
        if self.max_tokens == 0 and not self.echo:
            raise InputError("max_tokens must be at least 1, or 0 together with echo=true.", param="max_tokens")
        prompts = self.prompts
        num_made = self._num_made()
        if len(prompts) * num_made > MAX_CHOICES:
            raise InputError(
                f"{len(prompts)} prompts of {num_made} choices each are more than {MAX_CHOICES} choices in one "
                f"request. Send several requests.",
                param="prompt" if num_made == 1 else "n" if num_made == self.n else "best_of",
            )
        return GenerationJob(
            prompts=prompts,
            sampling=self.sampling(max(1, self.max_tokens)),
            n=num_made,
            num_returned=self.n if num_made > self.n else None,
            logprobs=self.logprobs,
            echo=self.echo,
            discard_output=self.max_tokens == 0,
            grammar_field=self.grammar_field,
            labels=self.labels,
            suffix=self._checked_suffix(),
            prompt_options=replace(self.prompt_options, add_special_tokens=self.add_special_tokens),
            text_options=self.text_options,
            **self.engine_options,
        )

    def _num_made(self) -> int:
        """Choices of a prompt that are generated."""
        best_of = self.n if self.best_of is None else self.best_of
        if best_of < self.n:
            raise InputError(f"best_of={best_of} choices cannot give the best n={self.n}.", param="best_of")
        if best_of > self.n and self.stream:
            raise InputError("best_of works without stream: the best choice is known at the end.", param="best_of")
        if best_of > self.n and self.prompt_logprobs is not None:
            raise InputError("best_of works without prompt_logprobs.", param="best_of")
        return best_of

    def _checked_suffix(self) -> str | None:
        if not self.suffix:
            return None
        for name in ("echo", "truncate_prompt_tokens"):
            if getattr(self, name):
                raise InputError(f"suffix works without {name}.", param="suffix")
        return self.suffix


class ChatCompletionRequest(ToolFields, GenerationRequest):
    """`POST /v1/chat/completions`. Without a limit the answer may fill the model's length."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = CHAT
    INSTEAD: ClassVar[Mapping[str, str]] = CHAT_INSTEAD
    ALIASES: ClassVar[Mapping[str, Alias]] = CHAT_ALIASES
    DEFAULT_EFFORTS: ClassVar[Mapping[str, str]] = {"verbosity": "medium"}

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @property
    def num_items(self) -> int:
        """Of the request's longest list, and what else work on it grows with."""
        num_parts = sum(1 if isinstance(m.content, str) else len(m.content) for m in self.messages)
        num_calls = sum(len(m.tool_calls) for m in self.messages if m.tool_calls)
        return num_parts + num_calls + MAX_MESSAGES * self.is_long

    def refuse_hopeless(self, max_length: int) -> None:
        """A message has a token or more, for its role."""
        if self.truncate_prompt_tokens is not None:
            return
        num_characters = sum(message.num_characters for message in self.messages)
        at_least = max(len(self.messages), num_characters // TOKEN_CHARACTERS)
        refuse_at_least(at_least, max_length, "messages")

    def job(self) -> GenerationJob:
        """Raises InputError where fields contradict each other."""
        self.check()
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs has a meaning only with logprobs=true.", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InputError("max_tokens and max_completion_tokens differ: give one of them.", param="max_tokens")
        messages = named_results([message.for_template() for message in self.messages])
        if self.echo and messages[-1]["role"] != "assistant":
            raise InputError(
                "echo repeats the assistant's message that the answer follows, and the last message is another's.",
                param="echo",
            )
        efforts = {name: getattr(self, name) for name in ("reasoning_effort", "verbosity")}
        return GenerationJob(
            messages=messages,
            sampling=self.sampling(limits.pop() if limits else None),
            n=self.n,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            template_options=self.template_options(),
            efforts={name: value for name, value in efforts.items() if value is not None},
            default_efforts=self.DEFAULT_EFFORTS,
            chat=self.chat_output(_last_text(messages) if self.continue_final_message else ""),
            grammar_field=self.grammar_field,
            labels=self.labels,
            prompt_options=self.prompt_options,
            text_options=self.text_options,
            **self.engine_options,
        )

    @property
    def echoed(self) -> str:
        """What the answer's text begins with."""
        return _last_text(named_results([self.messages[-1].for_template()])) if self.echo else ""


def _last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last message."""
    content = messages[-1].get("content", "")
    return content if isinstance(content, str) else str(content[-1].get("text", "")) if content else ""


RequestT = TypeVar("RequestT", bound=ApiRequest)


def parse_request(kind: type[RequestT], body: bytes) -> RequestT:
    """An HTTP body as a request. Raises InputError that names the field at fault."""
    return validated(kind, decode_object(body))


def validated(kind: type[RequestT], fields: Mapping[str, Any]) -> RequestT:
    """A request of these fields. Raises InputError that names the field at fault."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        whole = _with_whole_numbers(fields)
        if whole is not fields:
            return validated(kind, whole)
        raise _explain(error) from None


def _with_whole_numbers(value: Any) -> Any:
    """The value with integers for floats without a fraction, which JSON does not tell apart; itself without any.

    For a body that was refused: no other pays for it.
    """
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return value
    changed = {key: new for key, old in items if (new := _with_whole_numbers(old)) is not old}
    if not changed:
        return value
    if isinstance(value, list):
        return [changed.get(index, old) for index, old in enumerate(value)]
    return {**value, **changed}


def checked_prompt(prompt: Any) -> Any:
    """Raises ValueError for what is neither a text, nor a list of texts, ids, or non-empty lists of ids."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_prompt_list(prompt)):
        return prompt
    raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists; none of them empty")


def prompts_of(prompt: Prompt) -> list[str | list[int]]:
    """A list of prompts, each a text or a list of ids."""
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


def least_tokens(prompt: str | list[int]) -> int:
    """A prompt has so many tokens or more."""
    return len(prompt) // TOKEN_CHARACTERS if isinstance(prompt, str) else len(prompt)


def refuse_at_least(num_tokens: int, max_length: int, param: str) -> None:
    """Raises PromptTooLongError where `num_tokens`, the fewest there can be, are too many already."""
    if num_tokens > max_length:
        error = PromptTooLongError(num_tokens, max_length, at_least=True)
        error.param = param
        raise error


def _is_prompt_list(prompt: list[Any]) -> bool:
    """Not a mixture. (`True` is not an id.)"""
    kinds = set(map(type, prompt))
    if kinds == {list}:
        return all(set(map(type, ids)) == {int} for ids in prompt)
    return kinds in ({str}, {int})


def _explain(error: ValidationError) -> InputError:
    """One readable sentence a mistake (three at most); `param` is the first one's field."""
    told: list[tuple[str, str]] = []
    for problem in error.errors(include_url=False, include_input=False)[:MAX_PROBLEMS]:
        place = _place(problem["loc"])
        if problem["type"] == FIELD_ERROR:
            named = [(f"{place}.{p.name}" if place else p.name, p.sentence) for p in problem["ctx"]["problems"]]
            told += [(inner, sentence(inner)) for inner, sentence in named]
        else:
            told.append((place, _sentence(problem["type"], place, problem["msg"])))
    sentences = " ".join(sentence for _, sentence in told[:MAX_PROBLEMS])
    return InputError(sentences, param=told[0][0] or None)


def _place(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].type`: the path of a field, without the <tags> of union branches."""
    place = ""
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.startswith("<"):
            place += f".{part}" if place else str(part)
    return place


def _sentence(kind: str, place: str, message: str) -> str:
    if kind == "missing":
        return f"The field {place!r} is required."
    return f"The field {place!r} is not valid: {message.removeprefix('Value error, ')}."
