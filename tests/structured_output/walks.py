"""Random texts of a grammar: tokens drawn from the masks, as a model without any knowledge would."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from max_ray.structured_output import GrammarMatcher, TokenVocabulary

CLOSERS = b'"}]'  # drawn more often, so that texts end


def allowed_tokens(matcher: GrammarMatcher, vocab_size: int) -> list[int]:
    """Ids that the mask of the next step allows."""
    mask = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
    matcher.fill_mask(mask)
    return [int(i) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size])]


def random_walk(
    matcher: GrammarMatcher, vocabulary: TokenVocabulary, rng: random.Random, max_tokens: int = 400
) -> tuple[list[int], bool]:
    """Draws tokens until an end token. Returns the tokens without the end, and whether the end was reached."""
    tokens: list[int] = []
    end = vocabulary.eos_token_id
    while len(tokens) < max_tokens:
        allowed = allowed_tokens(matcher, len(vocabulary.tokens))
        assert (end in allowed) == matcher.may_end
        if end in allowed and (len(allowed) == 1 or rng.random() < 0.3):
            return tokens, True
        token = _draw([token for token in allowed if token != end], vocabulary.tokens, rng)
        matcher.advance([token])
        tokens.append(token)
    return tokens, False


def _draw(allowed: Sequence[int], texts: Sequence[bytes], rng: random.Random) -> int:
    closers = [token for token in allowed if texts[token] and texts[token][0] in CLOSERS]
    return rng.choice(closers if closers and rng.random() < 0.3 else allowed)
