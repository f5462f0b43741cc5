"""The XLM-RoBERTa network (Conneau et al. 2019): a BERT whose positions begin behind the padding token's number."""

from __future__ import annotations

from max_ray.nn.encoder import PostNormEncoder


class XLMRoberta(PostNormEncoder):
    """Token ids in, hidden states out: see PostNormEncoder."""
