"""The DistilBERT network (Sanh et al. 2019): a BERT with half of the layers and without token types."""

from __future__ import annotations

from max_ray.nn.encoder import PostNormEncoder


class DistilBert(PostNormEncoder):
    """Token ids in, hidden states out: see PostNormEncoder."""
