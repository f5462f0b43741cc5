"""Log probabilities: of sampled tokens with their alternatives, and of the tokens of a prompt (echo)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from max_ray.driver import Download
from max_ray.interfaces.context import LogProbabilities

_SLICE = 128  # prompt rows whose log-softmax is held at once


@dataclass(frozen=True, slots=True)
class TokenReport:
    """Log probabilities of n tokens, on their way to the host.

    tokens: int64 [n]. chosen: float32 [n]. top_values, top_ids: [n, K], K = the most alternatives that a row wants.
    """

    tokens: Download
    chosen: Download
    top_values: Download
    top_ids: Download

    @classmethod
    def of(cls, logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> TokenReport:
        """logits: float32 [n, V], penalized, before temperature. tokens: int64 [n]."""
        logprobs = logits.log_softmax(1)
        top_values, top_ids = logprobs.topk(min(num_top, logits.shape[1]), dim=1)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        return cls(*(Download(column) for column in (tokens, chosen, top_values, top_ids)))

    def entries(self, num_top: Sequence[int]) -> list[LogProbabilities]:
        """On the host, row i with num_top[i] alternatives; equal log probabilities in the order of their ids."""
        columns = (self.tokens, self.chosen, self.top_values, self.top_ids)
        lines = zip(*(column.wait().tolist() for column in columns), num_top, strict=True)
        return [
            LogProbabilities(token, chosen, sorted(zip(ids, values, strict=True), key=_likeliest_first)[:num])
            for token, chosen, values, ids, num in lines
        ]


def prompt_logprobs(
    logits: torch.Tensor, next_tokens: torch.Tensor | Sequence[int], num_top: int
) -> list[LogProbabilities]:
    """Entries of the prompt tokens `next_tokens` [n] that logits [n, V] of the tokens before them predict.

    Temperature and penalties play no part: nothing was sampled.
    """
    tokens = torch.as_tensor(next_tokens, dtype=torch.int64, device=logits.device)
    assert len(tokens) == len(logits), f"{len(logits)} rows of logits for {len(tokens)} tokens"
    entries: list[LogProbabilities] = []
    for start in range(0, len(tokens), _SLICE):
        some = tokens[start : start + _SLICE]
        report = TokenReport.of(logits[start : start + _SLICE].float(), some, num_top)
        entries += report.entries([num_top] * len(some))
    return entries


def _likeliest_first(pair: tuple[int, float]) -> tuple[float, int]:
    token_id, logprob = pair
    return -logprob, token_id
