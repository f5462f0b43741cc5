"""`serve.run` again: replicas stay where nothing of theirs has changed, and may overlap where something has."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from max_ray.config import PipelineConfig, ServeConfig
from max_ray.planning.hardware import Hardware
from max_ray.planning.plan import resolve_plan
from max_ray.serve import deployment_version as versions
from tests.serve.applications import replica_processes, running, text_of, worker_pids
from tests.serve.conftest import settings_for

GIB = 2**30


def version_of(model: Path, memory_bytes: int = 8 * GIB, **changes: Any) -> str:
    config = ServeConfig(**settings_for(model, 8000, "app", **changes))
    pipeline = PipelineConfig(**{name: getattr(config, name) for name in PipelineConfig.model_fields})
    plan = resolve_plan(pipeline, hardware=Hardware(4, memory_bytes, 0))
    return versions.deployment_version(config, plan)


def test_what_replicas_are_made_of_makes_their_version(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    before = version_of(model)
    assert version_of(model) == before
    same: list[dict[str, Any]] = [
        {"min_replicas": 2, "max_replicas": 2},
        {"max_replicas": 4, "target_ongoing_requests": 3.0},
        {"drain_timeout_s": 1.0, "max_stream_s": 9, "max_surge_percent": 50},
    ]
    assert {version_of(model, **changes) for changes in same} == {before}
    other: list[dict[str, Any]] = [
        {"max_length": 64},
        {"api_keys": ("another",)},
        {"max_queued_requests": 3},
        {"allowed_hosts": ("example.org",)},
        {"served_model_name": "other"},
    ]
    assert len({before, *(version_of(model, **changes) for changes in other)}) == 1 + len(other)
    (model / "config.json").touch()
    assert version_of(model) != before, "another checkpoint in the same folder"
    monkeypatch.setattr(versions.max_ray, "__version__", "0.0.0")
    assert len({before, version_of(model)}) == 2


@pytest.mark.ray
@pytest.mark.slow
async def test_another_number_of_replicas_leaves_replicas_and_workers_alone(
    ray_cluster: Any, tiny_llama: Path, serve_port: int
) -> None:
    from ray import serve

    from max_ray.serve.application import build_application

    async def deploy(**changes: Any) -> Any:
        config = ServeConfig(**settings_for(tiny_llama, serve_port, "again", **changes))
        return await asyncio.to_thread(build_application, config)

    async with running(await deploy(), serve_port, "again") as served:
        expected = await text_of(served, "x", 100)
        (replica,), workers = replica_processes("again"), worker_pids("again")
        built = await deploy(min_replicas=2, max_replicas=2)
        await asyncio.to_thread(lambda: serve.run(built, name="again", route_prefix="/again"))
        assert replica in replica_processes("again")
        assert set(workers) < set(worker_pids("again"))
        built = await deploy(max_surge_percent=100, drain_timeout_s=5)
        await asyncio.to_thread(lambda: serve.run(built, name="again", route_prefix="/again"))
        assert await text_of(served, "x", 100) == expected
        built = await deploy(max_surge_percent=100, max_queued_requests=7)  # a change: new replicas
        await asyncio.to_thread(lambda: serve.run(built, name="again", route_prefix="/again"))
        assert await text_of(served, "x", 100) == expected
        assert replica not in replica_processes("again")
