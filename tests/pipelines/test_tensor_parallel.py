"""Tensor parallel 2 equals 1: two ranks as two threads, and as two processes that only share a run request."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from max_ray.interfaces import RunRequest, RunRow
from max_ray.planning.plan import resolve_plan
from tests import naive
from tests.engine.rank_process import run_rank
from tests.pipelines.conftest import Lab, make_context, random_prompt, run_to_end

NUM_TOKENS = 10


@pytest.mark.parametrize("page_size", [1, 16])
def test_two_ranks_in_one_process_equal_one(lab: Lab, page_size: int) -> None:
    prompts = [random_prompt(n, seed=5) for n in (1, 17, 33)]
    contexts = [make_context(prompt, max_new_tokens=NUM_TOKENS, logprobs=2) for prompt in prompts]
    contexts.append(make_context(prompts[2], max_new_tokens=NUM_TOKENS, temperature=1.0, seed=3, top_p=0.9))
    outputs = run_to_end(lab.pipeline(page_size, tensor_parallel_size=2), contexts, num_steps=4)
    assert [output.tokens for output in outputs[:3]] == [lab.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    for prompt, output in zip(prompts, outputs, strict=False):
        logits = naive.all_logits(lab.reference, [*prompt, *output.tokens])[len(prompt) - 1 : -1]
        expected = logits.log_softmax(1).gather(1, torch.tensor(output.tokens)[:, None])[:, 0].tolist()
        assert output.log_probabilities is not None
        assert [entry.log_probability for entry in output.log_probabilities] == pytest.approx(expected, abs=1e-4)
    sampled = naive.generate(lab.reference, prompts[2], contexts[3].sampling_params, max_new_tokens=NUM_TOKENS)
    assert outputs[3].tokens == sampled.tokens


def test_two_processes_equal_one(lab: Lab, tmp_path: Path) -> None:
    prompts = [random_prompt(n, seed=6) for n in (5, 20)]
    contexts = [make_context(prompt, max_new_tokens=NUM_TOKENS) for prompt in prompts]
    for number, context in enumerate(contexts):
        context.block_table = torch.arange(3 * number, 3 * number + 3, dtype=torch.int32).numpy()
    request = RunRequest(1, [RunRow.from_context(context, NUM_TOKENS) for context in contexts], NUM_TOKENS)
    plan = resolve_plan(lab.config(tensor_parallel_size=2))
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe(duplex=False) for _ in range(2)]
    meeting = str(tmp_path / "meeting")
    ranks = [
        spawn.Process(target=run_rank, args=(rank, plan, meeting, request, pipes[rank][1]), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for receiver, _ in pipes:
        assert receiver.poll(150), "a rank did not answer"
    by_rank = [receiver.recv() for receiver, _ in pipes]
    for process in ranks:
        process.join(20)
        assert process.exitcode == 0
    assert by_rank[0] == by_rank[1]
    assert [list(tokens) for tokens in zip(*by_rank[0], strict=True)] == [lab.greedy(p, NUM_TOKENS) for p in prompts]
