"""Tensor parallelism as it is deployed: two processes, one rank each, joined by gloo."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch

from tests.architectures.engine import random_tokens
from tests.architectures.rank_process import LENGTHS, ODD_VOCABULARY, run_rank
from tests.architectures.reference import reference_logits
from tests.checkpoints import make_llama


def test_two_processes_equal_hugging_face_with_one_kv_head_and_an_odd_vocabulary(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "model", vocab_size=ODD_VOCABULARY, num_key_value_heads=1, attention_bias=True)
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe(duplex=False) for _ in range(2)]
    init_method = f"file://{tmp_path / 'rendezvous'}"
    ranks = [
        spawn.Process(target=run_rank, args=(rank, path, init_method, pipes[rank][1]), daemon=True) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        reference = reference_logits(path, random_tokens(LENGTHS, ODD_VOCABULARY))
        for receive, _ in pipes:
            assert receive.poll(150), "a rank did not answer"
            for mine, theirs in zip(receive.recv(), reference, strict=True):
                torch.testing.assert_close(torch.from_numpy(mine), theirs, atol=1e-4, rtol=0)
    finally:
        for process in ranks:
            process.join(60)
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
