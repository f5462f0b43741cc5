"""Orders for tiny groups, and runs to send them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from max_ray.actors.messages import NAMESPACE, GroupInfo, GroupSpec, MemberStatus, RegistryStatus
from max_ray.actors.registry_calls import get_registry
from max_ray.config import PipelineConfig
from max_ray.interfaces import RunRequest, RunRow, SamplingParams
from max_ray.planning.plan import resolve_plan


def make_spec(model: Path, app: str, *, size: int = 1, lease_grace_s: float = 30.0, **times: float) -> GroupSpec:
    config = PipelineConfig(
        model_path=str(model),
        tensor_parallel_size=size,
        num_threads=1,
        devices="cpu",
        max_batch_size=8,
        kv_cache_page_size=4,
        max_num_steps=8,
    )
    return GroupSpec(app, resolve_plan(config), lease_grace_s=lease_grace_s, **times)


def make_run(run_id: int, *, num_steps: int = 12, temperature: float = 0.0, row_ids: str = "ab") -> RunRequest:
    """Rows of different lengths with made-up block tables, 16 blocks each; page size 4."""
    rows = [
        RunRow(
            request_id=name,
            active_tokens=np.arange(10, 15 + 3 * i),
            processed_length=0,
            block_table=np.arange(16 * i, 16 * (i + 1), dtype=np.int32),
            max_new_tokens=num_steps,
            sampling_params=SamplingParams(temperature=temperature, seed=7 + i),
            stop_ids=frozenset(),
            generated_length=0,
            prompt_length=5 + 3 * i,
        )
        for i, name in enumerate(row_ids)
    ]
    return RunRequest(run_id, rows, num_steps)


def worker_statuses(info: GroupInfo) -> list[MemberStatus]:
    """What the workers say of themselves, one a rank."""
    return list(ray.get([worker.describe.remote() for worker in info.workers]))


def num_used_blocks(kv_manager: Any) -> int:
    """Blocks that requests hold, by the KV manager's own count."""
    status = ray.get(kv_manager.describe.remote())
    return int(status.num_blocks - status.num_free_blocks)


def kill(actor: Any) -> None:
    """Kills the actor's process, as a crash would."""
    ray.kill(actor, no_restart=True)


def actors_of(app: str) -> list[str]:
    """Names of living actors of the application's groups."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [entry["name"] for entry in named if entry["namespace"] == NAMESPACE and entry["name"].startswith(f"{app}-")]


async def registry_status() -> RegistryStatus:
    status: RegistryStatus = await get_registry().status.remote()
    return status


async def eventually(condition: Callable[[], bool], within_s: float, what: str) -> float:
    """Waits until the condition holds; gives the seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.1)
    return time.monotonic() - started
