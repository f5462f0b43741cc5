"""How many replicas a model behind a front gets, and what keeps the stores while there is no replica. Without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from max_ray.config import ServeConfig
from max_ray.serve import application_actor
from max_ray.serve.application_actor import ApplicationActor, group_app
from max_ray.serve.model_replica import OPEN_REQUESTS, replicas_needed, scaling


def context(metrics: dict[str, float], running: list[str], by_handles: float = 0.0) -> Any:
    return SimpleNamespace(
        aggregated_metrics={OPEN_REQUESTS: metrics},
        running_replicas=running,
        total_num_requests=by_handles,
        config=SimpleNamespace(target_ongoing_requests=4.0),
    )


@pytest.mark.parametrize(
    ("metrics", "running", "by_handles", "needed"),
    [
        ({}, [], 0, 0),
        ({"a": 0.0}, ["a"], 0, 0),
        ({"a": 1.0}, ["a"], 0, 0.25),
        ({"a": 6.0, "b": 6.0}, ["a", "b"], 0, 3),
        ({"a": 6.0, "gone": 6.0}, ["a"], 0, 1.5),
        ({"a": 2.0}, ["a"], 2, 1),
    ],
)
def test_the_policy(metrics: dict[str, float], running: list[str], by_handles: float, needed: float) -> None:
    assert replicas_needed(context(metrics, running, by_handles)) == (needed, {})


def test_the_settings_of_scaling() -> None:
    fixed = scaling(ServeConfig(model_path="m", min_replicas=2, max_replicas=2))
    assert fixed == {"num_replicas": 2}
    found = scaling(ServeConfig(model_path="m", min_replicas=0, max_replicas=3, scale_to_zero_after_s=7))
    options = found["autoscaling_config"]
    assert (options.min_replicas, options.max_replicas, options.downscale_to_zero_delay_s) == (0, 3, 7)
    assert options.look_back_period_s > options.metrics_interval_s


async def test_a_front_keeps_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []

    async def status() -> Any:
        return SimpleNamespace(groups=groups)

    registry = SimpleNamespace(status=SimpleNamespace(remote=status))
    monkeypatch.setattr(application_actor.ray, "get_actor", lambda *_: registry)
    actor = ApplicationActor("app")
    assert not await actor._is_needed()
    groups.append(SimpleNamespace(app=group_app("app", "Model0-m")))
    assert await actor._is_needed()
    groups[:] = [SimpleNamespace(app="application")]
    assert not await actor._is_needed()
    await actor.need()
    assert await actor._is_needed()
