"""Fill-in-the-middle: a completion between a prompt and a `suffix`, for models whose vocabulary has tokens for it.

| models                                   | prompt                                                    |
|------------------------------------------|-----------------------------------------------------------|
| Qwen2.5-Coder, Qwen3-Coder, CodeGemma    | `<|fim_prefix|>` P `<|fim_suffix|>` S `<|fim_middle|>`     |
| StarCoder, StarCoder2, Granite Code      | `<fim_prefix>` P `<fim_suffix>` S `<fim_middle>`           |
| DeepSeek-Coder                           | `<｜fim▁begin｜>` P `<｜fim▁hole｜>` S `<｜fim▁end｜>`        |
| CodeLlama                                | `▁<PRE>` P `▁<SUF>` S `▁<MID>`                             |
| Codestral                                | `[SUFFIX]` S `[PREFIX]` P                                  |

The parts are encoded apart, so no token lies across a border.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from max_ray.errors import InputError
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.openai import GenerationJob
from max_ray.tokenization.tokenizer import TextTokenizer


@dataclass(frozen=True)
class InfillFormat:
    """How a family writes the two sides of a gap.

    Args:
        prefix: The token before the text that precedes the gap.
        suffix: The token before the text that follows it.
        middle: The token after which the model writes; empty where it writes on behind the prefix.
        ends: Tokens that end what is written, besides those that end a text; as far as the vocabulary has them.
    """

    prefix: str
    suffix: str
    middle: str = ""
    ends: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The tokens that a vocabulary must have."""
        return tuple(name for name in (self.prefix, self.suffix, self.middle) if name)


_BARS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
FORMATS = (
    InfillFormat(*_BARS, ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>")),
    InfillFormat("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>", "<file_sep>", "<fim_pad>")),
    InfillFormat("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    InfillFormat("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", ("\u2581<EOT>",)),
    InfillFormat("[PREFIX]", "[SUFFIX]"),
)
"""The first one whose tokens a vocabulary has counts."""


def infill_format(tokenizer: TextTokenizer) -> InfillFormat | None:
    """The format of a model, None where its vocabulary has no tokens for one.

    Args:
        tokenizer: Of the model.
    """
    return next((f for f in FORMATS if all(tokenizer.token_id(name) is not None for name in f.names)), None)


async def with_infill(job: GenerationJob, engine: Engine) -> GenerationJob:
    """The job with prompts of token ids that have the suffix in them; a job without a suffix is given back as it is.

    Args:
        job: The request.
        engine: Serves the model.

    Raises:
        InputError: The model has no tokens for it.
    """
    if job.suffix is None:
        return job
    tokenizer = engine.tokenizer
    form = infill_format(tokenizer)
    if form is None:
        raise InputError(
            "The vocabulary of this model has no tokens for a suffix (fill-in-the-middle). Leave it out.",
            param="suffix",
        )
    suffix = await _ids_of(tokenizer, job.suffix)
    start = _start(tokenizer) if job.prompt_options.add_special_tokens else []
    prompts = [start + _arranged(form, await _ids_of(tokenizer, p), suffix, tokenizer) for p in job.prompts]
    ends = [found for name in form.ends if (found := tokenizer.token_id(name)) is not None]
    stops = [*(job.sampling.get("stop_token_ids") or ()), *ends]
    return replace(job, prompts=prompts, suffix=None, sampling={**job.sampling, "stop_token_ids": stops})


async def _ids_of(tokenizer: TextTokenizer, text: str | list[int]) -> list[int]:
    if not isinstance(text, str):
        return text
    ids: list[int] = (await tokenizer.encode(text, False)).tolist()
    return ids


def _start(tokenizer: TextTokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text."""
    plain, whole = (tokenizer.encode_text("a", added).tolist() for added in (False, True))
    place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    start: list[int] = whole[:place]
    return start


def _arranged(form: InfillFormat, prefix: list[int], suffix: list[int], tokenizer: TextTokenizer) -> list[int]:
    marks = {name: found for name in form.names if (found := tokenizer.token_id(name)) is not None}
    if not form.middle:
        return [marks[form.suffix], *suffix, marks[form.prefix], *prefix]
    return [marks[form.prefix], *prefix, marks[form.suffix], *suffix, marks[form.middle]]
