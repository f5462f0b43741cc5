"""What a client asks for: ids, sampling parameters, the text-generation request."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Literal
from uuid import uuid4

from max_ray.errors import InputError
from max_ray.interfaces.grammar import GrammarSpec
from max_ray.interfaces.image import PromptImage
from max_ray.interfaces.logit_controls import LogitControls


@dataclass(frozen=True, slots=True)
class RequestID:
    """Identity of one request; unique unless given."""

    value: str = field(default_factory=lambda: uuid4().hex)

    def __str__(self) -> str:
        return self.value

    def __hash__(self) -> int:
        return hash(self.value)  # looked up for each request in each step; the generated one makes a tuple first


@dataclass(frozen=True)
class Request:
    """Base of all requests."""

    request_id: RequestID


_MAX_COUNT = 2**31  # counts of tokens below it fit every array and message that they travel in


def _random_seed() -> int:
    return secrets.randbits(32)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is picked.

    Order of operations on the logits: bias, penalties, DRY, allowed tokens, bad words, min-tokens and grammar masks,
    then (greedy: argmax) or temperature, top-k, top-p, min-p, typical-p, XTC, one draw. `temperature=0` or `top_k=1` is
    greedy. `top_k=-1`, `top_p=1` and `min_p=0` are off.
    Repetition penalty looks at prompt and output (Keskar et al. 2019, CTRL, sec. 4.1); frequency and presence
    penalties at the output only (the OpenAI API reference). `seed`: 64 bits; drawn at random when not given.
    `structured_output`: what the text must match. Tokens that do not fit are masked before temperature; the text ends
    where the grammar does, so `ignore_eos` and `min_new_tokens` cannot be given with it.
    `logit_controls`: rarer parameters; None where none is given.
    Raises InputError for values out of range.
    """

    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    temperature: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = field(default_factory=_random_seed)
    structured_output: GrammarSpec | None = None
    logit_controls: LogitControls | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise InputError(f"{name} must be {rule}, not {getattr(self, name)!r}.", param=name)

        for name in (
            "top_p",
            "min_p",
            "temperature",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
        ):
            check(math.isfinite(getattr(self, name)), name, "a finite number")
        for name in ("top_k", "max_new_tokens", "min_new_tokens", "seed"):
            value = getattr(self, name)
            check(isinstance(value, Integral) or (value is None and name == "max_new_tokens"), name, "a whole number")
        check(self.top_k == -1 or self.top_k >= 0, "top_k", "-1 or 0 (off) or a positive integer")
        check(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        check(self.temperature >= 0, "temperature", "at least 0")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
        check(self.repetition_penalty > 0, "repetition_penalty", "greater than 0")
        check(self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        check(0 <= self.min_new_tokens < _MAX_COUNT, "min_new_tokens", f"from 0 to {_MAX_COUNT - 1}")
        check(-(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")
        if self.structured_output is not None and self.structured_output.kind != "reasoning":
            check(
                not self.ignore_eos,
                "ignore_eos",
                "false: the grammar of the structured output says where the text ends",
            )
            check(
                self.min_new_tokens == 0,
                "min_new_tokens",
                "0: the grammar of the structured output says where the text ends",
            )
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def needs_penalties(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)

    @property
    def needs_history(self) -> bool:
        """Whether the next token depends on more of the text than the model sees anyway."""
        controls = self.logit_controls
        return (
            self.needs_penalties
            or self.structured_output is not None
            or (controls is not None and controls.needs_history)
        )

    @classmethod
    def from_input_and_generation_config(
        cls, given: Mapping[str, Any], generation_config: Mapping[str, Any]
    ) -> SamplingParams:
        """Priority: what the user gave (None = not given) > generation_config.json > class default.

        The names of LogitControls stand beside those of this class. `generation_config` uses Hugging Face's names.
        `do_sample: false` means greedy there, unless the user gave a temperature.
        """
        defaults: dict[str, Any] = {}
        for ours, theirs in _GENERATION_CONFIG_NAMES.items():
            if generation_config.get(theirs) is not None:
                defaults[ours] = generation_config[theirs]
        if generation_config.get("do_sample") is False:
            defaults["temperature"] = 0.0
        if defaults.get("top_k") == 0:
            defaults["top_k"] = -1
        known = {f.name for f in fields(cls)}
        controls = {f.name for f in fields(LogitControls)}
        wanted = {k: v for k, v in given.items() if v is not None}
        is_short = wanted.get("max_new_tokens", math.inf) < defaults.get("min_new_tokens", 0)
        if is_short or "structured_output" in wanted:
            defaults.pop("min_new_tokens", None)  # a default never contradicts what the user gave
        if wanted.get("min_new_tokens", 0) > defaults.get("max_new_tokens", math.inf):
            del defaults["max_new_tokens"]
        values = {**defaults, **wanted}
        rare = {name: values.pop(name) for name in controls & values.keys()}
        unknown = sorted(set(values) - known)
        assert not unknown, f"not sampling parameters: {unknown}"
        given_controls = LogitControls(**rare)
        return cls(**values, logit_controls=given_controls if given_controls.changes_anything else None)


_GENERATION_CONFIG_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
}
_UNSUPPORTED_OPTIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), (0, 0.0)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams"), (1, 1.0)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
}
"""Options of a generation_config.json that change the text and are not supported, with their neutral values."""


def unsupported_generation_options(generation_config: Mapping[str, Any]) -> list[str]:
    """Options of a generation_config.json that change what transformers generates and have no effect here."""
    return [
        f"{name}={generation_config[name]!r}"
        for name, neutral in _UNSUPPORTED_OPTIONS.items()
        if generation_config.get(name) is not None and generation_config[name] not in neutral
    ]


@dataclass(frozen=True)
class TextGenerationRequest(Request):
    """One text to continue: exactly one of `prompt` (text or token ids) and `messages` (chat) is given.

    `sampling_params=None` means the model's generation_config.json defaults; a mapping holds only what the user
    gave, and the tokenizer merges it with those defaults; a SamplingParams is taken as it is.
    `logprobs`: how many alternatives to report per token besides the chosen one; None reports nothing at all.
    `echo`: with `logprobs`, report the prompt's log probabilities too.
    `cache_salt`: only requests with the same one share cached prefixes. `priority`: lower numbers run earlier.
    `images`: with a prompt of token ids, what its image placeholders stand for; those of messages are in the messages.
    `add_special_tokens`: whether a prompt of text gets the tokens that begin a text (beginning of sequence).
    `truncate_prompt_tokens`: a longer prompt keeps so many tokens; -1 keeps what fits the model's length with one
    token more. `truncation_side`: the side that is cut off.
    """

    model_name: str = ""
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    sampling_params: SamplingParams | Mapping[str, Any] | None = None
    logprobs: int | None = None
    echo: bool = False
    chat_template_options: Mapping[str, Any] | None = None
    images: Sequence[PromptImage] = ()
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "left"
    cache_salt: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        if (self.prompt is None) == (not self.messages):
            raise InputError("Give either a prompt or messages, and not both.", param="prompt")
