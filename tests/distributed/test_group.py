"""Joining a group: real processes, a rank that dies or never comes, and what listens where."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch

from max_ray.distributed import TPGroup, all_reduce, init_tp_group
from max_ray.errors import ConfigError, WorkerGroupError
from tests.nn.ranks import run_ranks

CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening_addresses() -> set[str]:
    return {c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}


def add_up_until_rank_1_dies(rank: int, size: int, init_method: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    tp = init_tp_group(rank, size, init_method, CPU, timeout_s=30)
    answer.send((all_reduce(torch.tensor([rank + 1.0]), tp).item(), listening_addresses()))
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    try:
        all_reduce(torch.ones(100_000), tp)
        answer.send(("no error", 0.0))
    except WorkerGroupError as error:
        answer.send((str(error), time.monotonic() - start))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_meet_listen_on_loopback_only_and_notice_a_death_at_once(size: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    init_method = f"tcp://127.0.0.1:{free_port()}"
    pipes = [spawn.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        spawn.Process(target=add_up_until_rank_1_dies, args=(rank, size, init_method, pipes[rank][1]), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        for receive, _ in pipes:
            assert receive.poll(120), "a rank did not answer"
            total, addresses = receive.recv()
            assert total == size * (size + 1) / 2
            assert addresses <= {"127.0.0.1"}
        assert pipes[0][0].poll(60), "rank 0 hangs after the death of rank 1"
        message, seconds = pipes[0][0].recv()
        assert "a rank died or hangs" in message
        assert seconds < 10
    finally:
        for process in ranks:
            process.join(60)
            process.kill()


def test_the_store_and_the_transport_listen_on_loopback_only() -> None:
    before = {c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
    new: list[str] = []

    def rank(tp: TPGroup) -> None:
        all_reduce(torch.ones(1), tp)
        if tp.rank == 0:
            found = {c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
            new.extend(address.ip for address in found - before)
        all_reduce(torch.ones(1), tp)

    run_ranks(2, rank, init_method=f"tcp://127.0.0.1:{free_port()}")
    assert set(new) == {"127.0.0.1"}


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerGroupError, match=r"Rank 0 could not join its tensor-parallel group of 2 at file://"):
        init_tp_group(0, 2, f"file://{tmp_path / 'meeting'}", CPU, timeout_s=0.5)
    assert time.monotonic() - start < 10


def test_nobody_listens_there() -> None:
    with pytest.raises(WorkerGroupError, match="Rank 1 could not join"):
        init_tp_group(1, 2, f"tcp://127.0.0.1:{free_port()}", CPU, timeout_s=1)


def test_the_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(WorkerGroupError, match="Address already in use"):
            init_tp_group(0, 2, f"tcp://127.0.0.1:{taken.getsockname()[1]}", CPU, timeout_s=1)


@pytest.mark.parametrize("count", [1, 100_000])
@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_stops_answering_is_an_error_after_the_timeout(size: int, count: int) -> None:
    def rank(tp: TPGroup) -> str:
        if tp.rank == 1:
            time.sleep(1.5)
            return ""
        with pytest.raises(
            WorkerGroupError, match=f"all_reduce of rank {tp.rank} in a tensor-parallel group of {size} failed"
        ):
            all_reduce(torch.ones(count), tp)
        return "told"

    told = run_ranks(size, rank, timeout_s=0.7)
    assert told == ["told", ""] + ["told"] * (size - 2)


@pytest.mark.parametrize("init_method", ["env://", "tcp://host", "127.0.0.1:80", ""])
def test_other_ways_to_meet_are_refused(init_method: str) -> None:
    with pytest.raises(ConfigError, match="must look like tcp://host:port or file:///path"):
        init_tp_group(0, 2, init_method, CPU, timeout_s=1)


def test_one_rank_needs_nobody() -> None:
    tp = init_tp_group(0, 1, "unused", CPU)
    assert (tp.rank, tp.size, tp.process_group) == (0, 1, None)
    tp.destroy()


def test_a_group_is_frozen_and_its_rank_is_in_it() -> None:
    with pytest.raises(FrozenInstanceError):
        TPGroup.single().rank = 1  # type: ignore[misc]
    with pytest.raises(AssertionError, match="rank 2 of 2"):
        TPGroup(rank=2, size=2, device=CPU)


LEAVES_AT_ONCE = """
import sys, time, torch
from max_ray.distributed import init_tp_group

sys.setswitchinterval(1000)
tp = init_tp_group(0, 2, "file://" + sys.argv[1], torch.device("cpu"), 30)
layers = [tp]
layers.append(layers)  # kept until the end, as a network is
tp.process_group.allreduce([torch.ones(1)])
print("leaving", flush=True)
end = time.monotonic() + 1
while time.monotonic() < end:  # meanwhile gloo is done, and its thread waits for the lock to free its tensor
    pass
"""


def test_a_process_leaves_in_peace_while_the_transport_frees_a_tensor(tmp_path: Path) -> None:
    meeting = str(tmp_path / "meeting")
    command = [sys.executable, "-c", LEAVES_AT_ONCE, meeting]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            tp = init_tp_group(1, 2, f"file://{meeting}", CPU, timeout_s=60)
            assert process.stdout is not None
            assert process.stdout.readline() == "leaving\n"
            assert all_reduce(torch.ones(1), tp).item() == 2.0
            tp.destroy()
            _, messages = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, messages) == (0, "")


def test_several_groups_live_in_one_process() -> None:
    def outer(tp: TPGroup) -> list[float]:
        mine = all_reduce(torch.tensor([1.0]), tp).item()
        inner = run_ranks(3, lambda small: all_reduce(torch.tensor([1.0]), small).item())
        return [mine, *inner, all_reduce(torch.tensor([2.0]), tp).item()]

    assert run_ranks(2, outer) == [[2.0, 3.0, 3.0, 3.0, 4.0]] * 2
