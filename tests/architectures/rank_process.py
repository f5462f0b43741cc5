"""What one rank does in a process of its own; a light module, since a spawned process imports it anew."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import torch

from max_ray.distributed import init_tp_group
from tests.architectures.engine import Engine, load_model, random_tokens

LENGTHS, CHUNKS = [17, 1, 30], [[9, 8], [1], [29, 1]]
ODD_VOCABULARY = 97


def run_rank(rank: int, path: Path, init_method: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    tp = init_tp_group(rank, 2, init_method, torch.device("cpu"), timeout_s=100)
    engine = Engine(load_model(path, tp))
    logits = engine.logits_of(random_tokens(LENGTHS, ODD_VOCABULARY), CHUNKS)
    answer.send([piece.numpy() for piece in logits])
    tp.destroy()
