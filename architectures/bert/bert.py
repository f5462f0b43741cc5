"""The BERT network (Devlin et al. 2018): learned positions, post-norm layers, attention in both directions."""

from __future__ import annotations

from max_ray.nn.encoder import PostNormEncoder


class Bert(PostNormEncoder):
    """Token ids in, hidden states out: see PostNormEncoder."""
