"""Fields of both kinds of generation requests that vLLM and llama.cpp add to OpenAI's, and what they come to.

| field                                              | effect                                                         |
|----------------------------------------------------|----------------------------------------------------------------|
| `include_stop_str_in_output`                       | the stop string that ends the text is part of it               |
| `skip_special_tokens: false`                       | the text shows special tokens by their names                   |
| `truncate_prompt_tokens`, `truncation_side`        | a longer prompt is cut                                         |
| `return_token_ids`                                 | ids of the prompt's and of the answer's tokens                 |
| `return_tokens_as_token_ids`                       | log probabilities name tokens `token_id:5`                     |
| `timings_per_token`                                | every chunk and answer has `timings`                           |
| `t_max_predict_ms`                                 | ends the text at a time after its first line                   |
| `timeout`                                          | ends the request with an error, as `x-request-timeout-seconds` |
| `request_id`                                       | is in the answer's `id`                                        |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from max_ray.errors import InputError
from max_ray.serve.api.request_fields import StrictModel

MAX_LABEL_CHARACTERS = 512
_LONGEST_S = 10.0**6


def _short(text: str) -> str:
    if len(text) > MAX_LABEL_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters, more than {MAX_LABEL_CHARACTERS}")
    return text


ShortText = Annotated[
    str, AfterValidator(_short), WithJsonSchema({"type": "string", "maxLength": MAX_LABEL_CHARACTERS})
]


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How a prompt becomes token ids. The names are those of `TextGenerationRequest`."""

    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "left"

    def as_fields(self) -> dict[str, Any]:
        """As arguments of a TextGenerationRequest."""
        return vars(self)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What the text of a choice holds.

    Args:
        includes_stop: Whether the stop string or token that ends it is part of it.
        shows_special: Whether it shows special tokens.
        gives_token_ids: Whether deltas have the ids of their tokens.
        time_limit_s: The text ends so long after its first token, once it has a line break; None: no limit.
    """

    includes_stop: bool = False
    shows_special: bool = False
    gives_token_ids: bool = False
    time_limit_s: float | None = None


class ExtensionFields(StrictModel):
    """The fields."""

    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    timings_per_token: bool = False
    t_max_predict_ms: float | None = Field(default=None, ge=-1, le=_LONGEST_S * 1000)
    timeout: float | None = Field(default=None, gt=0, le=_LONGEST_S)
    request_id: Annotated[ShortText, Field(min_length=1)] | None = None

    def check_extensions(self) -> None:
        """Raises InputError where fields contradict each other."""
        if self.truncate_prompt_tokens == 0:
            raise InputError(
                "truncate_prompt_tokens keeps at least 1 token; -1 keeps as many as the model takes.",
                param="truncate_prompt_tokens",
            )
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise InputError("truncation_side has a meaning only with truncate_prompt_tokens.", param="truncation_side")

    @property
    def prompt_options(self) -> PromptOptions:
        """How the prompt becomes ids."""
        return PromptOptions(
            truncate_prompt_tokens=self.truncate_prompt_tokens, truncation_side=self.truncation_side or "left"
        )

    @property
    def text_options(self) -> TextOptions:
        """What the text holds."""
        limit = self.t_max_predict_ms
        return TextOptions(
            includes_stop=self.include_stop_str_in_output,
            shows_special=not self.skip_special_tokens,
            gives_token_ids=self.return_token_ids,
            time_limit_s=limit / 1000 if limit is not None and limit > 0 else None,
        )
