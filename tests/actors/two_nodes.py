"""Two raylets with addresses of their own on this machine; the replica is on the one where no worker fits.

    python -m tests.actors.two_nodes MODEL    prints what was found, as JSON

A process of its own: another Ray may run in the one that starts it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
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


async def steps_a_second(group: LeasedGroup, first_run: int) -> float:
    started, steps = time.perf_counter(), 0
    for run_id in range(first_run, first_run + 20):
        steps += len(await run_all(group.executor, make_run(run_id, num_steps=40)))
    return steps / (time.perf_counter() - started)


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
        "steps_a_second": await steps_a_second(group, 10),
    }
    ray.kill(group.info.workers[1], no_restart=True)
    await group.rebuild()
    found["after_rebuild"] = await run_all(group.executor, make_run(100))
    await group.release()
    return found


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.2"})
    cluster.add_node(num_cpus=4, node_ip_address="127.0.0.3")
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        print(json.dumps(asyncio.run(find_out(Path(sys.argv[1])))))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
