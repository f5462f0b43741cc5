"""`prompt_logprobs`: log probabilities of the prompt's tokens, in vLLM's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from max_ray.interfaces import LogProbabilities
from max_ray.serve.api.choice import Choice
from max_ray.serve.api.formats import finite
from max_ray.serve.api.objects.openai import PromptLogprob, PromptLogprobs
from max_ray.tokenization.token_bytes import TokenText


def with_prompt_logprobs(
    answer: dict[str, Any], choices: Sequence[Choice], tokens: TokenText, num_top: int, *, is_chat: bool
) -> dict[str, Any]:
    """The answer with the field that vLLM adds: of each choice of a completion, of a chat's answer itself.

    Args:
        answer: OpenAI's object.
        choices: That it tells of, complete.
        tokens: Of the model.
        num_top: Alternatives to report for each token.
        is_chat: Whether it answers messages.
    """
    reports = [_report(choice, tokens, num_top) for choice in choices]
    if is_chat:
        return answer | {"prompt_logprobs": reports[0]}
    objects = zip(answer["choices"], reports, strict=True)
    return answer | {"choices": [choice | {"prompt_logprobs": report} for choice, report in objects]}


def _report(choice: Choice, tokens: TokenText, num_top: int) -> PromptLogprobs:
    """One entry a prompt token; None for the first one, which nothing precedes."""
    return [None if entry is None else _entry(entry, tokens, num_top) for entry in choice.prompt_entries]


def _entry(entry: LogProbabilities, tokens: TokenText, num_top: int) -> dict[str, PromptLogprob]:
    """By token id: the prompt's token, then the likeliest ones. rank: from 1; None beyond the reported ones."""
    ranks = {token: rank for rank, (token, _) in enumerate(entry.top, start=1)}
    wanted = {entry.token_id: entry.log_probability} | dict(entry.top[:num_top])
    return {
        str(token): {"logprob": finite(value), "rank": ranks.get(token), "decoded_token": tokens.text_of(token)}
        for token, value in wanted.items()
    }
