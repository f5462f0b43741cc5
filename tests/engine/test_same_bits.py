"""bfloat16, and weights of 8 and 4 bits, with the C++ kernels: a request gets the same tokens and log probabilities
alone, in any batch, behind a cached prefix, and with decode steps from a tape or without. (With the reference
implementation sums depend on the batch.)

python -m pytest tests/engine/test_same_bits.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from max_ray.interfaces import TextContext
from max_ray.kernels import native
from max_ray.pipelines.text_generation import TextGenerationPipeline
from tests.pipelines.conftest import Lab, make_context, random_prompt, run_to_end

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
LENGTHS = [1, 15, 16, 17, 40, 63, 64, 65, 100]


def bf16(lab: Lab, encoding: str = "bfloat16", **settings: Any) -> TextGenerationPipeline:
    return lab.pipeline(quantization_encoding=encoding, **settings)


def contexts() -> list[TextContext]:
    """Greedy and sampled rows of many lengths."""
    return [
        make_context(random_prompt(n, seed=5), max_new_tokens=30, logprobs=0, temperature=0.9 * (i % 2), seed=i)
        for i, n in enumerate(LENGTHS)
    ]


def answers(pipeline: TextGenerationPipeline, rows: list[TextContext], num_steps: int) -> list[tuple[list[int], Any]]:
    outputs = run_to_end(pipeline, rows, num_steps)
    return [(out.tokens, [e.log_probability for e in out.log_probabilities or []]) for out in outputs]


@pytest.mark.parametrize(
    ("num_steps", "encoding"), [(1, "bfloat16"), (8, "float16"), (8, "bfloat16"), (8, "q8_0"), (1, "q4_0"), (1, "q4_1")]
)
def test_alone_equals_in_a_batch(lab: Lab, num_steps: int, encoding: str) -> None:
    together = answers(bf16(lab, encoding), contexts(), num_steps)
    alone = [answers(bf16(lab, encoding), [row], 8)[0] for row in contexts()]
    assert together == alone


@pytest.mark.parametrize("encoding", ["bfloat16", "float16", "q8_0"])
def test_a_cached_prefix_changes_nothing(lab: Lab, encoding: str) -> None:
    pipeline = bf16(lab, encoding)
    cold = answers(pipeline, [contexts()[-1]], 8)
    again = contexts()[-1]
    assert answers(pipeline, [again], 8) == cold
    assert again.cached_prefix_length > 0


@pytest.mark.parametrize("encoding", ["bfloat16", "float16", "q8_0"])
def test_a_tape_changes_nothing(lab: Lab, encoding: str) -> None:
    pipeline = bf16(lab, encoding)
    (runner,) = pipeline.executor.runners  # type: ignore[attr-defined]
    assert runner._graphs is not None, "this model's decode steps come from tapes"
    recorded = answers(pipeline, contexts(), 8)
    assert runner._graphs._replays, "nothing was recorded: the case tests nothing"
    graphs, runner._graphs = runner._graphs, None
    try:
        assert answers(bf16(lab, encoding), contexts(), 8) == recorded
    finally:
        runner._graphs = graphs


def test_tapes_keep_no_more_memory_than_they_may(lab: Lab) -> None:
    pipeline = bf16(lab)
    (runner,) = pipeline.executor.runners  # type: ignore[attr-defined]
    expected = answers(bf16(lab), contexts(), 8)
    graphs = runner._graphs
    graphs._replays.clear()
    answers(bf16(lab), contexts()[:1], 8)
    one_row = graphs._replays[1].nbytes
    assert one_row > 0
    graphs._replays.clear()
    graphs._max_bytes = 6 * one_row
    # rows end after different numbers of tokens, so that steps of many sizes follow each other
    uneven = contexts()
    for i, row in enumerate(uneven):
        row.sampling_params = replace(row.sampling_params, max_new_tokens=30 - 3 * i)
    got = answers(bf16(lab), uneven, 8)
    assert [tokens for tokens, _ in got] == [tokens[: 30 - 3 * i] for i, (tokens, _) in enumerate(expected)]
    sizes = list(graphs._replays)
    assert sizes[-1] == 1, "the last steps have one row"
    assert len(sizes) < len(LENGTHS)
    assert sum(replay.nbytes for replay in graphs._replays.values()) <= graphs._max_bytes
