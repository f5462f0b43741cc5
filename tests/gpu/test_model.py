"""A tiny Llama on the GPU: greedy tokens equal Hugging Face's; graphs and lookahead change nothing; nobody waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.checkpoints import load_reference, make_llama
from tests.gpu.device import DEVICE, REHEARSAL, capture, no_waiting
from tests.gpu.models import Lab, request, tokens_of

PROMPTS = [
    [7 + (31 * i * j) % 250 for j in range(1, length + 1)] for i, length in enumerate((1, 15, 16, 17, 40, 3, 64))
]
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
    {"repetition_penalty": 1.5},
    {"temperature": 0.9, "frequency_penalty": 0.7, "min_p": 0.05},
]
NUM_STEPS = 3 if REHEARSAL else 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return make_llama(tmp_path_factory.mktemp("llama"), tokenizer=False, **sizes)


@pytest.fixture(scope="module")
def lab(checkpoint: Path) -> Lab:
    return Lab(checkpoint, DEVICE)


@pytest.fixture(scope="module")
def greedy(checkpoint: Path) -> list[list[int]]:
    """Hugging Face's, in float32 on the CPU."""
    reference = load_reference(checkpoint)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = reference.generate(ids, max_new_tokens=NUM_STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("replayed", [False, True])
def test_greedy_tokens_equal_hugging_face(lab: Lab, greedy: list[list[int]], replayed: bool, lookahead: int) -> None:
    runner = lab.runner(capture() if replayed else None, lookahead)
    assert tokens_of(runner, request(PROMPTS, NUM_STEPS, [{}])) == greedy
    for prompt, expected in zip(PROMPTS[:3], greedy, strict=False):
        assert tokens_of(runner, request([prompt], NUM_STEPS, [{}])) == [expected]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_rows_end_inside_a_run(lab: Lab, greedy: list[list[int]], lookahead: int) -> None:
    stops = [{tokens[3 + i]} for i, tokens in enumerate(greedy)]
    ends = [tokens.index(next(iter(stop))) + 1 for tokens, stop in zip(greedy, stops, strict=True)]
    runner = lab.runner(capture(), lookahead)
    for _ in range(2):
        found = tokens_of(runner, request(PROMPTS, NUM_STEPS, [{}], stops))
        assert found == [tokens[:end] for tokens, end in zip(greedy, ends, strict=True)]


def test_sampled_tokens_do_not_depend_on_graphs_and_lookahead(lab: Lab) -> None:
    run = request(PROMPTS, NUM_STEPS, KINDS)
    plain = tokens_of(lab.runner(None, 0), run)
    runner = lab.runner(capture(), 1)
    assert runner._graphs is not None
    runner._graphs.capture_all()
    assert tokens_of(runner, run) == plain
    assert tokens_of(runner, run) == plain
    assert len({tuple(tokens) for tokens in plain}) == len(PROMPTS)


@pytest.mark.parametrize("encoding", ["bfloat16", "float16", "q8_0", "q4_k", "q5_k"])
def test_half_precision_with_graphs_is_near_to_without(checkpoint: Path, encoding: str) -> None:
    """A graph cuts its attention into more splits, so the last bits differ and a token may, where two logits are near:
    in one row of four at most."""
    lab = Lab(checkpoint, DEVICE, encoding)
    run = request(PROMPTS[:4], 8, [{}])
    replayed, plain = tokens_of(lab.runner(capture(), 1), run), tokens_of(lab.runner(None, 0), run)
    assert sum(a == b for a, b in zip(replayed, plain, strict=True)) >= 3


def test_the_host_waits_for_nothing_but_the_tokens(lab: Lab) -> None:
    runner, run = lab.runner(capture(), 1), request(PROMPTS[:4], NUM_STEPS, KINDS)
    tokens_of(runner, run)  # captures, compiles
    with no_waiting():
        tokens_of(runner, run)
