"""The BERT network (Devlin et al. 2018): learned positions, post-norm layers, attention in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from max_ray.nn.encoder import EqualRows, PostNormEncoder, types_of_pairs


class Bert(PostNormEncoder):
    """Token ids in, hidden states out: see PostNormEncoder."""


class BertOfPairs(Bert):
    """The same for two texts in a row, of which the second one's tokens have the type 1."""

    def token_types(self, tokens: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor | None:
        return types_of_pairs(tokens, groups)
