"""A draw among the allowed tokens gives the token of a draw from the whole vocabulary with the others hidden."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from max_ray.engine.sampling.grammar_masks import MAX_SHARE, GrammarMasks, RowMask
from max_ray.engine.sampling.sampler import Sampler
from max_ray.interfaces import RunRow, SamplingParams
from max_ray.structured_output import GrammarCompiler
from max_ray.structured_output.check_process import byte_vocabulary

VOCAB_SIZE = 1003  # no whole words
CPU = torch.device("cpu")


def row(**params: Any) -> RunRow:
    return RunRow(
        request_id="a",
        active_tokens=np.array([1]),
        processed_length=0,
        block_table=np.zeros(1, dtype=np.int32),
        max_new_tokens=1000,
        sampling_params=SamplingParams(**params),
        stop_ids=frozenset(),
        generated_length=0,
        prompt_length=1,
    )


def bits_of(allowed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    flags = np.zeros(-(-VOCAB_SIZE // 32) * 32, dtype=np.uint8)
    flags[allowed] = 1
    return np.packbits(flags, bitorder="little").view(np.uint32)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.7, "top_p": 0.6},
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 1.0, "min_p": 0.1, "top_p": 0.95, "top_k": 300},
    ],
)
def test_the_token_is_that_of_the_whole_vocabulary(params: dict[str, Any]) -> None:
    """One allowed token to all of them, at the border between the two ways too."""
    compiler = GrammarCompiler(byte_vocabulary)
    maker, rng = GrammarMasks([row()], VOCAB_SIZE, CPU, compiler), np.random.default_rng(5)
    border = int(MAX_SHARE * VOCAB_SIZE)
    seen = set()
    for number, count in enumerate([1, 2, 3, 50, border - 1, border, border + 1, VOCAB_SIZE] * 6):
        allowed = np.sort(rng.permutation(VOCAB_SIZE)[:count])
        mask = maker._row_mask(bits_of(allowed))
        assert (mask.few is None) == (count > border)
        assert mask.few is None or mask.few.tolist() == allowed.tolist()
        assert mask.forbidden is None or (~mask.forbidden).nonzero()[:, 0].tolist() == allowed.tolist()
        hidden = torch.ones(VOCAB_SIZE, dtype=torch.bool)
        hidden[allowed] = False
        logits = torch.from_numpy(rng.normal(0, 3, (2, VOCAB_SIZE)).astype(np.float32))
        sampler = Sampler([row(seed=number, **params), row(seed=number + 1000, **params)], VOCAB_SIZE, CPU)
        whole = RowMask(mask.bits, forbidden=hidden)
        tokens = [drawn(sampler, logits, {0: one}) for one in (mask, whole)]
        assert tokens[0] == tokens[1]
        assert tokens[0][0] in allowed
        seen.add(tokens[0][0])
    assert len(seen) > 10
    compiler.close()


def drawn(sampler: Sampler, logits: torch.Tensor, masks: dict[int, RowMask]) -> list[int]:
    """Tokens of two rows, the first one masked."""
    return [int(t) for t in sampler._pick_masked(logits.clone(), sampler._batch_of((0, 1)), np.arange(2), masks)]
