"""Two raylets with addresses of their own on this machine; the replica is on the one where no worker fits.

    python -m tests.actors.two_nodes MODEL         prints what was found, as JSON
    python -m tests.actors.two_nodes MODEL speed   steps a second by TCP and by a Unix socket, 10 pairs by turns

A process of its own: another Ray may run in the one that starts it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from max_ray.actors import member_connections
from max_ray.actors.leased_group import LeasedGroup
from max_ray.actors.messages import GroupSpec
from max_ray.actors.network import this_node
from max_ray.interfaces import BlockRequest, CacheUpdate, RunExtension
from max_ray.pipelines.factory import PipelineFactory
from tests.actors.helpers import make_run, make_spec
from tests.actors.test_worker_group import run_all

PORTS = (23600, 23699)


def local_tokens(spec: GroupSpec) -> list[list[int]]:
    executor: Any = PipelineFactory(spec.plan)().executor
    return [step.tokens.tolist() for step in executor.execute(make_run(1))]


async def extended_tokens(group: LeasedGroup) -> list[list[int]]:
    """A run of 5 steps that is extended to 12."""
    request = make_run(2, num_steps=5)
    request.rows = [replace(row, block_table=row.block_table[:3]) for row in request.rows]
    tables = {i: row.block_table for i, row in enumerate(make_run(2).rows)}
    tokens = []
    async for output in group.executor.stream(request):
        tokens.append(output.tokens.tolist())
        if output.step == 0:
            group.executor.extend(RunExtension(2, 1, 12, np.array([12, 12]), tables))
    return tokens


async def steps_a_second(group: LeasedGroup, run_ids: Iterator[int]) -> float:
    group.executor.close()
    await run_all(group.executor, make_run(next(run_ids)))  # connects
    started, steps = time.perf_counter(), 0
    for _ in range(20):
        steps += len(await run_all(group.executor, make_run(next(run_ids), num_steps=40)))
    return steps / (time.perf_counter() - started)


async def compare(model: Path) -> dict[str, Any]:
    """Both raylets are on one machine, so a Unix socket reaches the workers too once it is asked for."""
    group = await LeasedGroup.acquire(make_spec(model, "speed", size=2), 0, "owner")
    group.keep(print)
    place = await group.info.workers[0].locate.remote(group.info.epoch)
    run_ids, pairs = itertools.count(1), []
    for _ in range(10):
        member_connections.this_node = this_node
        by_tcp = await steps_a_second(group, run_ids)
        member_connections.this_node = lambda: place
        pairs.append((by_tcp, await steps_a_second(group, run_ids)))
    await group.release()
    return {"pairs": pairs, "median_ratio": statistics.median(tcp / unix for tcp, unix in pairs)}


async def find_out(model: Path) -> dict[str, Any]:
    spec = replace(make_spec(model, "two", size=2), worker_port_range=PORTS)
    endpoints: list[Any] = []
    listening = member_connections.listening

    def noted(*args: Any, **kwargs: Any) -> Any:
        endpoints.append(kwargs)
        return listening(*args, **kwargs)

    member_connections.listening = noted
    group = await LeasedGroup.acquire(spec, 0, "owner")
    workers = [await worker.locate.remote(group.info.epoch) for worker in group.info.workers]
    first = await run_all(group.executor, make_run(1))
    reply = await group.kv_cache.update(CacheUpdate(requests=[BlockRequest("a", 8)]))
    found = {
        "replica": this_node().node_id,
        "workers": [place.node_id for place in workers],
        "peers": [kwargs["peer_address"] for kwargs in endpoints],
        "ports": [kwargs["port_range"] for kwargs in endpoints],
        "blocks": len(reply.grants["a"].block_ids) if reply.grants["a"] else 0,
        "expected": local_tokens(spec),
        "tokens": first,
        "extended": await extended_tokens(group),
    }
    ray.kill(group.info.workers[1], no_restart=True)
    await group.rebuild()
    found["after_rebuild"] = await run_all(group.executor, make_run(100))
    await group.release()
    return found


def main() -> None:
    work = compare if sys.argv[2:] == ["speed"] else find_out
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.2"})
    cluster.add_node(num_cpus=4, node_ip_address="127.0.0.3")
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        print(json.dumps(asyncio.run(work(Path(sys.argv[1])))))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
