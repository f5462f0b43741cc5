"""Request fields that act on single tokens or need the text so far, and those that say how the engine treats a request.

| field                                                           | known from       |
|-----------------------------------------------------------------|------------------|
| `logit_bias`                                                    | OpenAI, llama.cpp |
| `allowed_token_ids`, `bad_words`, `prompt_logprobs`             | vLLM             |
| `priority`, `cache_salt`                                        | vLLM             |
| `typical_p`, `xtc_*`, `dry_*`, `repeat_last_n`                  | llama.cpp        |
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema

from max_ray.interfaces.logit_controls import MAX_ALLOWED_TOKENS, MAX_BAD_WORDS, MAX_BIASED_TOKENS, MAX_WINDOW
from max_ray.serve.api.request_fields import StrictModel, ranged

MAX_WORD_CHARACTERS = 512
MAX_WORDS_CHARACTERS = 16384
MAX_BREAKERS = 64
MAX_BREAKER_CHARACTERS = 40
MAX_PROMPT_LOGPROBS = 20
_PRIORITIES = 2**31


def _logit_bias(given: Any) -> list[tuple[int | str, float]]:
    """OpenAI's `{"id": bias}`, or llama.cpp's `[[id or text, bias or false], ..]`, as pairs."""
    if isinstance(given, dict):
        pairs: Iterable[Any] = given.items()
    elif isinstance(given, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        pairs = given
    else:
        raise ValueError("it must be an object of token ids and numbers, or a list of pairs")
    if len(given) > MAX_BIASED_TOKENS:
        raise ValueError(f"it has {len(given)} entries, more than {MAX_BIASED_TOKENS}")
    return [(_biased(key, is_id=isinstance(given, dict)), _bias(value)) for key, value in pairs]


def _biased(key: Any, *, is_id: bool) -> int | str:
    if is_id and isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 19:
        return int(key)
    is_pair_key = (type(key) is int and 0 <= key < 2**63) or (isinstance(key, str) and key)
    if is_id or not is_pair_key:
        raise ValueError("a key must be a token id" + ("" if is_id else " or a text"))
    if isinstance(key, str) and len(key) > MAX_WORD_CHARACTERS:
        raise ValueError(f"a text may have {MAX_WORD_CHARACTERS} characters at most")
    found: int | str = key
    return found


def _bias(value: Any) -> float:
    if value is False:  # llama.cpp: never
        return -math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
        raise ValueError("a bias must be a number from -100 to 100, or false for a token that must not come")
    return float(value)


def _words(words: list[str]) -> list[str]:
    if not all(words):
        raise ValueError("a word must not be empty")
    if max(map(len, words), default=0) > MAX_WORD_CHARACTERS or sum(map(len, words)) > MAX_WORDS_CHARACTERS:
        raise ValueError(
            f"a word may have {MAX_WORD_CHARACTERS} characters at most, and all together {MAX_WORDS_CHARACTERS}"
        )
    return words


def _breakers(texts: list[str]) -> list[str]:
    if not all(0 < len(text) <= MAX_BREAKER_CHARACTERS for text in texts):
        raise ValueError(f"a breaker must have 1 to {MAX_BREAKER_CHARACTERS} characters")
    return texts


def _salt(text: str) -> str:
    if not 0 < len(text) <= MAX_WORD_CHARACTERS:
        raise ValueError(f"it must have 1 to {MAX_WORD_CHARACTERS} characters")
    return text


_BIAS = {"anyOf": [{"type": "number", "minimum": -100, "maximum": 100}, {"const": False}]}
_WORD = {"type": "string", "minLength": 1, "maxLength": MAX_WORD_CHARACTERS}
_KEY = {"anyOf": [{"type": "integer", "minimum": 0}, _WORD]}
_PAIR = {"type": "array", "prefixItems": [_KEY, _BIAS], "minItems": 2, "maxItems": 2}
_BIAS_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "object", "patternProperties": {"^[0-9]{1,18}$": _BIAS}, "additionalProperties": False},
            {"type": "array", "items": _PAIR, "maxItems": MAX_BIASED_TOKENS},
        ]
    }
)


_Word = Annotated[str, WithJsonSchema(_WORD)]  # its length is checked by `_words` and `_salt`
_Breaker = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_BREAKER_CHARACTERS})]


class LogitFields(StrictModel):
    """Fields of both kinds of generation requests. Ranges of numbers are checked by `LogitControls`."""

    logit_bias: Annotated[list[tuple[int | str, float]], PlainValidator(_logit_bias), _BIAS_SCHEMA] | None = None
    allowed_token_ids: Annotated[list[int], Field(max_length=MAX_ALLOWED_TOKENS, fail_fast=True)] | None = None
    bad_words: (
        Annotated[list[_Word], Field(max_length=MAX_BAD_WORDS, fail_fast=True), AfterValidator(_words)] | None
    ) = None
    repeat_last_n: int | None = ranged(minimum=-1, maximum=MAX_WINDOW)
    typical_p: float | None = ranged(exclusiveMinimum=0, maximum=1)
    xtc_probability: float | None = ranged(minimum=0, maximum=1)
    xtc_threshold: float | None = ranged(minimum=0, maximum=1)
    dry_multiplier: float | None = ranged(minimum=0)
    dry_base: float | None = ranged(minimum=1)
    dry_allowed_length: int | None = ranged(minimum=1, maximum=2**31 - 1)
    dry_penalty_last_n: int | None = ranged(minimum=-1, maximum=2**31 - 1)
    dry_sequence_breakers: (
        Annotated[list[_Breaker], Field(max_length=MAX_BREAKERS, fail_fast=True), AfterValidator(_breakers)] | None
    ) = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_PROMPT_LOGPROBS)
    cache_salt: Annotated[_Word, AfterValidator(_salt)] | None = None
    priority: int = Field(default=0, ge=-_PRIORITIES, lt=_PRIORITIES)

    def logit_sampling(self) -> dict[str, Any]:
        """Sampling parameters by our names; only those that are given."""
        return {name: getattr(self, name) for name in _SAMPLING_NAMES if name in self.model_fields_set}

    @property
    def engine_options(self) -> dict[str, Any]:
        """Fields of a GenerationJob."""
        salt = self.cache_salt or ""
        return {"prompt_logprobs": self.prompt_logprobs, "cache_salt": salt, "priority": self.priority}


_SAMPLING_NAMES = LogitFields.model_fields.keys() - {"prompt_logprobs", "cache_salt", "priority"}
