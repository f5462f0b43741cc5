"""What the requests of Ollama's API share: options, `keep_alive`, the model's name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from max_ray.errors import InputError
from max_ray.serve.api.openai import StopText
from max_ray.serve.api.request_fields import Neutral, StrictModel, foreign_number, only, ranged

_DURATION = re.compile(r"-?([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+")
_NUMBER = re.compile(r"-?[0-9]{1,12}(\.[0-9]{1,6})?")
_AT_START = "It is a setting of the server's start."
_NO_NUMBER = 0


def _penalizes_newline(given: Any, request: Mapping[str, Any]) -> bool:
    return given is True or (given is False and request.get("repeat_penalty") in (None, 1))


class Options(StrictModel):
    """Sampling options. Those that say how a model is loaded are refused: it is loaded already."""

    NEUTRAL: ClassVar[Mapping[str, Neutral]] = {
        "mirostat": only(0),
        "mirostat_eta": foreign_number(),
        "mirostat_tau": foreign_number(),
        "num_keep": only(0, -1),
        "penalize_newline": Neutral(_penalizes_newline, "true", schema={"enum": [True, None]}),
        "tfs_z": only(1),
        **{
            name: only(instead=_AT_START)
            for name in (
                *("embedding_only", "f16_kv", "logits_all", "low_vram", "main_gpu", "num_batch", "num_gpu"),
                *("num_thread", "numa", "use_mlock", "use_mmap", "vocab_only"),
            )
        },
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {"max_tokens": "Use 'num_predict'.", "n_predict": "Use 'num_predict'."}

    num_ctx: int | None = Field(default=None, ge=1)
    num_predict: int | None = Field(default=None, ge=-2)
    temperature: float | None = ranged(minimum=0)
    top_k: int | None = ranged(minimum=-1)
    top_p: float | None = ranged(exclusiveMinimum=0, maximum=1)
    min_p: float | None = ranged(minimum=0, maximum=1)
    seed: int | None = ranged(minimum=-(2**63), maximum=2**64 - 1)
    stop: list[StopText] | None = None
    typical_p: float | None = ranged(exclusiveMinimum=0, maximum=1)
    repeat_last_n: int | None = ranged(minimum=-1, maximum=2**20)
    repeat_penalty: float | None = ranged(exclusiveMinimum=0)
    presence_penalty: float | None = ranged(minimum=-2, maximum=2)
    frequency_penalty: float | None = ranged(minimum=-2, maximum=2)

    @field_validator("num_predict")
    @classmethod
    def _check_num_predict(cls, value: int | None) -> int | None:
        if value == _NO_NUMBER:
            raise ValueError("it must be at least 1, or -1 or -2 for as many as the model's length allows")
        return value

    def sampling(self) -> dict[str, Any]:
        """By OpenAI's names."""
        limit = self.num_predict
        return {
            "max_tokens": limit if limit is not None and limit > 0 else None,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "repeat_last_n": self.repeat_last_n,
            "seed": self.seed,
            "stop": self.stop,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }

    def check(self, max_length: int) -> None:
        """Raises InputError for a longer context than the served one. A shorter one fits into it."""
        if self.num_ctx is not None and self.num_ctx > max_length:
            raise InputError(
                f"options.num_ctx={self.num_ctx} is more than the {max_length} tokens that this model is served with: "
                f"lower it, or serve with a larger --max-length.",
                param="options.num_ctx",
            )


def checked_keep_alive(value: Any) -> Any:
    """How long the model stays: always, here, so a request for less than nothing more is refused.

    Raises ValueError for what is no duration, and for 0, which asks to unload the model.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and (_DURATION.fullmatch(value) or _is_number(value))):
        raise ValueError('it is a number of seconds, or a duration such as "5m"')
    is_zero = value == 0 if is_number else re.search("[1-9]", value) is None
    if is_zero:
        raise ValueError("0 unloads the model: the served one stays as long as the server runs")
    return value


KEEP_ALIVE_SCHEMA = {
    "anyOf": [
        {"type": "number", "not": {"const": 0}},
        {"type": "string", "pattern": rf"^(?=.*[1-9])(?:{_DURATION.pattern}|{_NUMBER.pattern})$"},
    ]
}
"""What `checked_keep_alive` takes."""


def _is_number(value: str) -> bool:
    return _NUMBER.fullmatch(value) is not None


def model_name(name: str | None) -> str | None:
    """The name without the tag that Ollama adds to names without one."""
    return name.removesuffix(":latest") if name is not None else None
