"""What a rank keeps and what it ever held: a shard, not the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from max_ray.actors.leased_group import LeasedGroup
from max_ray.actors.messages import GroupSpec
from max_ray.planning.plan import resolve_plan
from tests.actors.helpers import make_spec, worker_statuses
from tests.checkpoints import make_llama

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

MIB = 2**20


def frugal_spec(model: Path, app: str, size: int) -> GroupSpec:
    spec = make_spec(model, app, size=size)
    return replace(spec, plan=resolve_plan(spec.plan.config.replace(kv_cache_memory=0.001)))


def peak_bytes(pid: int) -> int:
    """VmHWM: the most that was ever resident, file pages included."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


async def peak_and_kept(model: Path, app: str, size: int) -> tuple[int, int]:
    """Of the worker that needs most: its peak, and its unique set size once loaded."""
    group = await LeasedGroup.acquire(frugal_spec(model, app, size), 0, "owner")
    pids = [status.pid for status in worker_statuses(group.info)]
    assert len(set(pids)) == size
    peak = max(peak_bytes(pid) for pid in pids)
    kept = max(psutil.Process(pid).memory_full_info().uss for pid in pids)
    await group.release()
    return peak, kept


async def test_a_rank_of_two_holds_little_more_than_half(tiny_llama: Path, tmp_path: Path) -> None:
    model = make_llama(
        tmp_path / "large", hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    )
    stored = (model / "model.safetensors").stat().st_size
    assert stored > 100 * MIB
    grown: dict[int, tuple[int, int]] = {}
    for size in (1, 2):
        base = await peak_and_kept(tiny_llama, f"base{size}", size)
        large = await peak_and_kept(model, f"large{size}", size)
        grown[size] = (large[0] - base[0], large[1] - base[1])
    print({size: [round(value / MIB) for value in values] for size, values in grown.items()}, round(stored / MIB))
    assert grown[1][1] > 0.8 * stored, "the weights must dominate for this to mean anything"
    assert grown[2][0] <= 0.6 * grown[1][0], f"peak: {grown}"
    assert grown[2][1] <= 0.6 * grown[1][1], f"kept: {grown}"
