"""A check of the loaded network, before it serves: do its tokens know of each other through attention only?

A paged cache, continuous batching and prefix reuse all rest on one property: outside of attention, what a layer
computes for a token depends on that token and its position alone. Convolutions, recurrences, positions that are counted
and not read, ropes that depend on the longest row of a batch: all break it, and none of them can be seen for sure in
config.json. So the network runs a few tokens in two orders, and is refused where they come out different.
"""

from __future__ import annotations

from typing import Any

import torch

from architectures.transformers_adapter.skeleton import FOREIGN_ERRORS, one_line
from architectures.transformers_adapter.transformers_adapter import TransformersNetwork
from max_ray.errors import ConfigError

TOLERANCE = 0.05  # of an observation's standard deviation; far above rounding, far below what another token does


class Tokenwise:
    """The handler of the check: each token attends to itself. Keeps every layer's queries and keys, [T, ..] each."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
    ) -> torch.Tensor:
        self.seen += [x[0].transpose(0, 1).flatten(1).float() for x in (q, k)]
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2).contiguous()


def check_tokenwise(network: TransformersNetwork, name: str, vocab_size: int, max_length: int) -> None:
    """Raises ConfigError where the tokens of a batch change each other outside of attention, or the network's code
    fails. All ranks run it together."""
    device = network.device
    tokens = torch.tensor([3, 11, 5, 7, 2], device=device) % vocab_size
    positions = torch.tensor([0, 1, 2, 6, max_length - 1], device=device).clamp(max=max_length - 1)
    order = torch.tensor([3, 2, 0, 1], device=device)  # without the last token; everybody's neighbours change
    try:
        one = _observations(network, tokens, positions)
        other = _observations(network, tokens[order], positions[order])
    except FOREIGN_ERRORS as error:
        raise ConfigError(f"{name}: transformers' own code fails as a part of this server ({one_line(error)}).") from (
            error
        )
    _check_numbering(network, name, tokens[:4])
    network.restore()
    if any(_differ(a[order], b) for a, b in zip(one, other, strict=True)):
        raise ConfigError(
            f"{name} cannot run on a paged cache: outside of attention its tokens depend on the other tokens of the "
            "batch (a convolution, a recurrence, or positions that it counts by itself)."
        )


def _check_numbering(network: TransformersNetwork, name: str, tokens: torch.Tensor) -> None:
    """Raises ConfigError where the network, left to itself, does not number its tokens 0, 1, 2, .."""
    given = _observations(network, tokens, torch.arange(len(tokens), device=tokens.device))
    by_itself = _observations(network, tokens, None)
    if any(_differ(a, b) for a, b in zip(given, by_itself, strict=True)):
        raise ConfigError(
            f"{name} cannot run on a paged cache: it numbers its tokens by itself, otherwise than 0, 1, 2, .., and "
            "gives other results where it is told their positions."
        )


def _observations(
    network: TransformersNetwork, tokens: torch.Tensor, positions: torch.Tensor | None
) -> list[torch.Tensor]:
    """Queries and keys of every layer, and the logits, one row a token each. positions: None leaves them to the
    network."""
    handler = Tokenwise()
    network.set_handler(handler)
    with torch.inference_mode():
        logits = network.logits(tokens, positions, torch.arange(len(tokens), device=tokens.device))
    return [*handler.seen, logits.float()]


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether most tokens differ. (One may: rounding can send it to other experts.)"""
    changed = (a - b).abs().amax(1) > TOLERANCE * (a.std() + 1e-6)
    return bool(changed.sum() > len(changed) // 2)
