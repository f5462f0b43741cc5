"""One tensor-parallel rank in a process of its own. Imports little, so that the process starts soon."""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch

from max_ray.distributed.group import init_tp_group
from max_ray.interfaces import RunRequest
from max_ray.pipelines.factory import build_runner
from max_ray.planning.plan import PipelinePlan


def run_rank(rank: int, plan: PipelinePlan, meeting: str, request: RunRequest, answers: Connection) -> None:
    """Joins the group of two that meets at the file `meeting`, runs, and sends the tokens of every step."""
    torch.set_num_threads(1)
    runner = build_runner(plan, init_tp_group(rank, 2, f"file://{meeting}", torch.device("cpu")))
    answers.send([step.tokens.tolist() for step in runner.run(request)])
