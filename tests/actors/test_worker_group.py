"""Worker groups on a real Ray: a group computes what one process computes, and survives what may happen to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

from max_ray.actors.kv_manager_client import KVManagerClient
from max_ray.actors.leased_group import LeasedGroup
from max_ray.actors.messages import NAMESPACE, REGISTRY_NAME, GroupInfo
from max_ray.actors.registry_calls import get_registry
from max_ray.actors.worker_group import GroupExecutor
from max_ray.errors import MaxRayError, ParallelismError, StaleLeaseError, WorkerGroupError
from max_ray.interfaces import BlockRequest, CacheUpdate, RunExtension, RunRequest
from max_ray.pipelines.factory import PipelineFactory
from tests.actors.helpers import actors_of, eventually, kill, make_run, make_spec, registry_status, worker_statuses

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


async def run_all(executor: GroupExecutor, request: RunRequest) -> list[list[int]]:
    return [output.tokens.tolist() async for output in executor.stream(request)]


def pids(info: GroupInfo) -> list[int]:
    return [status.pid for status in worker_statuses(info)]


async def renewed(group: LeasedGroup, snapshot: bytes) -> dict[str, bytes]:
    """Once a registry is there again, which takes a busy machine a while."""
    for _ in range(10):
        try:
            return await group.renew(snapshot)
        except WorkerGroupError:
            await asyncio.sleep(0.5)
    raise AssertionError("no registry comes up")


@pytest.fixture(scope="module")
def local_tokens(tiny_llama: Path) -> dict[float, list[list[int]]]:
    """What one process computes for `make_run`, by temperature."""
    spec = make_spec(tiny_llama, "local")
    executor: Any = PipelineFactory(spec.plan)().executor
    return {t: [step.tokens.tolist() for step in executor.execute(make_run(1, temperature=t))] for t in (0.0, 1.0)}


@pytest.fixture
def spare_registry() -> Iterator[None]:
    """Brings the registry back for later tests."""
    yield
    get_registry()


async def test_two_ranks_compute_what_one_process_computes(
    tiny_llama: Path, local_tokens: dict[float, list[list[int]]]
) -> None:
    group = await LeasedGroup.acquire(make_spec(tiny_llama, "tp2", size=2), 0, "owner")
    assert {psutil.Process(pid).nice() for pid in pids(group.info)} == {psutil.Process().nice()}, "Ray's own: 15 more"
    assert await run_all(group.executor, make_run(1)) == local_tokens[0.0]
    assert await run_all(group.executor, make_run(2, temperature=1.0)) == local_tokens[1.0]

    kill(group.info.workers[1])  # rank 0 must not hang in a collective with the dead
    with pytest.raises(WorkerGroupError):
        await asyncio.wait_for(run_all(group.executor, make_run(5)), 20)
    await group.rebuild()
    assert await run_all(group.executor, make_run(6)) == local_tokens[0.0]
    await group.release()
    await eventually(lambda: not actors_of("tp2"), 10, "members end")
    assert not [row for row in placement_group_table().values() if "tp2" in row["name"] and row["state"] != "REMOVED"]


async def test_a_run_is_extended_on_all_ranks(tiny_llama: Path, local_tokens: dict[float, list[list[int]]]) -> None:
    group = await LeasedGroup.acquire(make_spec(tiny_llama, "extended", size=2), 0, "owner")
    request = make_run(1, num_steps=5)
    request.rows = [replace(row, block_table=row.block_table[:3]) for row in request.rows]  # 12 tokens
    tables = {i: row.block_table for i, row in enumerate(make_run(1).rows)}
    tokens = []
    async for output in group.executor.stream(request):
        tokens.append(output.tokens.tolist())
        if output.step == 0:
            assert group.executor.can_extend
            group.executor.extend(RunExtension(1, 1, 9, np.array([9, 9]), tables))
        if output.step == 5:
            group.executor.extend(RunExtension(1, 2, 12, np.array([12, 12]), {}))
    assert tokens == local_tokens[0.0]
    await group.release()


async def test_interrupt_ends_a_run_at_a_step_boundary(tiny_llama: Path) -> None:
    group = await LeasedGroup.acquire(make_spec(tiny_llama, "interrupt"), 0, "owner")
    outputs = []
    async for output in group.executor.stream(make_run(1, num_steps=50, row_ids="a")):
        outputs.append(output)
        if len(outputs) == 1:
            group.executor.interrupt(1)
    assert 1 <= len(outputs) < 50
    assert outputs[-1].last
    group.executor.interrupt(2)  # before the run is there
    early = await run_all(group.executor, make_run(2, num_steps=50, row_ids="a"))
    assert len(early) == 1
    assert len(await run_all(group.executor, make_run(3, row_ids="a"))) == 12
    await group.release()


async def test_a_successor_takes_over_a_warm_group_and_its_blocks(
    tiny_llama: Path, local_tokens: dict[float, list[list[int]]]
) -> None:
    spec = make_spec(tiny_llama, "warm")
    old = await LeasedGroup.acquire(spec, 0, "first")
    old_info, old_pids = old.info, pids(old.info)
    await old.kv_cache.update(CacheUpdate(requests=[BlockRequest("a", 40)]))
    abandoned = old.executor.stream(make_run(1, num_steps=40))
    await anext(abandoned)  # the owner dies in the middle of a run

    new = await LeasedGroup.acquire(spec, 0, "second")
    assert new.info.group_id == old_info.group_id
    assert new.info.epoch == old_info.epoch + 1
    assert pids(new.info) == old_pids
    reply = await new.kv_cache.update(CacheUpdate())
    assert reply.num_free_blocks == reply.num_blocks == spec.plan.num_blocks
    assert await run_all(new.executor, make_run(1)) == local_tokens[0.0]

    with pytest.raises(StaleLeaseError):
        await run_all(GroupExecutor(old_info), make_run(2))
    with pytest.raises(StaleLeaseError):
        await KVManagerClient(old_info).update(CacheUpdate())
    with pytest.raises(StaleLeaseError):
        await old.renew()
    told: list[MaxRayError] = []
    old.keep(told.append)
    await eventually(lambda: bool(told), 5, "the old owner is told")
    assert isinstance(told[0], StaleLeaseError)
    old.let_go()
    assert await run_all(new.executor, make_run(3)) == local_tokens[0.0]
    await new.release()


async def test_a_living_owner_is_not_robbed(tiny_llama: Path) -> None:
    spec = make_spec(tiny_llama, "alive")
    first = await LeasedGroup.acquire(spec, 0, "first")
    first.keep(lambda error: None)
    second = await LeasedGroup.acquire(spec, 0, "second")
    assert second.info.group_id != first.info.group_id
    await first.release()
    await second.release()


async def test_a_dead_kv_manager_is_replaced_and_the_workers_stay(
    tiny_llama: Path, local_tokens: dict[float, list[list[int]]]
) -> None:
    group = await LeasedGroup.acquire(make_spec(tiny_llama, "kv"), 0, "owner")
    before = pids(group.info)
    kill(group.info.kv_manager)
    with pytest.raises(WorkerGroupError):
        await group.kv_cache.update(CacheUpdate(requests=[BlockRequest("a", 4)]))
    ledger = await group.rebuild()
    assert pids(group.info) == before
    reply = await ledger.update(CacheUpdate(requests=[BlockRequest("a", 4)]))
    assert reply.num_free_blocks == reply.num_blocks - 1
    assert await run_all(group.executor, make_run(1)) == local_tokens[0.0]
    await group.release()


@pytest.mark.usefixtures("spare_registry")
async def test_a_new_registry_reads_back_who_has_what(tiny_llama: Path) -> None:
    spec = make_spec(tiny_llama, "readback")
    group = await LeasedGroup.acquire(spec, 0, "owner")
    kill(ray.get_actor(REGISTRY_NAME, namespace=NAMESPACE))
    assert await renewed(group, b"numbers") == {"owner": b"numbers"}
    status = await registry_status()
    assert [(row.group_id, row.owner_id) for row in status.groups if row.app == "readback"] == [
        (group.info.group_id, "owner")
    ]
    await group.rebuild()
    assert len(await run_all(group.executor, make_run(1))) == 12
    await group.release()


@pytest.mark.usefixtures("spare_registry")
async def test_a_group_ends_itself_when_nobody_renews_even_without_a_registry(tiny_llama: Path) -> None:
    spec = make_spec(tiny_llama, "expiry", size=2, lease_grace_s=2)
    group = await LeasedGroup.acquire(spec, 0, "owner")
    kill(ray.get_actor(REGISTRY_NAME, namespace=NAMESPACE))
    await eventually(lambda: not actors_of("expiry"), 20, "members end")
    states = [row["state"] for row in placement_group_table().values() if group.info.group_id in row["name"]]
    assert states in ([], ["REMOVED"])


async def test_no_room_says_what_is_wanted_and_what_there_is(tiny_llama: Path) -> None:
    spec = make_spec(tiny_llama, "gpus", size=2, start_timeout_s=3)
    spec = replace(spec, plan=replace(spec.plan, device="cuda"))
    asking = asyncio.create_task(LeasedGroup.acquire(spec, 0, "owner"))
    message = ""
    for _ in range(40):
        await asyncio.sleep(0.1)
        rows = [row for row in (await registry_status()).groups if row.app == "gpus"]
        message = rows[0].message if rows else message
        if message:
            break
    assert "'GPU': 2.0" in message
    with pytest.raises(ParallelismError, match=r"needs .*'GPU': 2.*the cluster has .*'GPU': 0"):
        await asking
    assert not actors_of("gpus")
