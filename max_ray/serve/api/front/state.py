"""What the front itself knows and counts: numbers of all replicas, requests that no replica answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from max_ray.serve.api.front.replica_table import ReplicaTable
from max_ray.serve.api.front.served_model import ModelTable, ServedModel
from max_ray.serve.api.metrics import MetricsSnapshot
from max_ray.serve.api.metrics_page import MetricsPage


class FrontCounts:
    """Requests that the front answered itself, by route and status."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request.

        Args:
            route: The template of its route.
            status: HTTP status of the answer.
            seconds: Not kept: these answers wait for nothing.
        """
        self.requests[route, status] += 1


class FrontState:
    """Of one replica of the front.

    Args:
        models: All of the application.
        replicas: Where they run.
    """

    def __init__(self, models: ModelTable, replicas: ReplicaTable) -> None:
        self.models = models
        self.replicas = replicas
        self.metrics = FrontCounts()
        self._page = MetricsPage()
        self.snapshots: Mapping[str, Sequence[MetricsSnapshot]] = {}
        lengths = [model.max_length for model in models]
        self.tokenizer = SimpleNamespace(max_length=max(lengths, default=0), takes_images=False)

    def take(self, snapshots: Mapping[str, Sequence[MetricsSnapshot]]) -> None:
        """Takes over what the replicas have told last.

        Args:
            snapshots: By the name of their model.
        """
        self.snapshots = snapshots
        for model in self.models:
            found = snapshots.get(model.name, ())
            self.replicas.update(model.name, {one.address: one.stats.healthy for one in found if one.address})

    @property
    def num_waiting(self) -> int:
        """Requests in the queues of all replicas."""
        return sum(one.stats.queued for found in self.snapshots.values() for one in found)

    def state_of(self, model: ServedModel) -> str:
        """`ready`, `recovering` (no replica is well), `starting` (requests wait for one) or `idle`."""
        replicas = self.replicas.replicas(model.name)
        if any(one.is_healthy for one in replicas):
            return "ready"
        if replicas:
            return "recovering"
        return "starting" if model.min_replicas or self.replicas.is_waking(model.name) else "idle"

    def missing(self) -> list[str]:
        """The models that should answer and do not."""
        return [model.name for model in self.models if model.min_replicas and self.state_of(model) != "ready"]

    def view(self, model: ServedModel) -> dict[str, Any]:
        """A model in `/v1/server`."""
        found = self.snapshots.get(model.name, ())
        return {
            "id": model.name,
            "state": self.state_of(model),
            "min_replicas": model.min_replicas,
            "replicas": len(self.replicas.replicas(model.name)),
            "running": sum(one.stats.running for one in found),
            "queued": sum(one.stats.queued for one in found),
            "generated_tokens": sum(one.generated_tokens for one in found),
        }

    def render(self) -> bytes:
        """Prometheus' text of all models, and of the front."""
        snapshots = [one for model in self.models for one in self.snapshots.get(model.name, ())]
        return self._page.render(snapshots) + self._own_metrics()

    def _own_metrics(self) -> bytes:
        replicas = GaugeMetricFamily("max_ray_replicas", "Replicas that take requests.", labels=["model_name"])
        for model in self.models:
            replicas.add_metric([model.name], len(self.replicas.replicas(model.name)))
        text = "Requests that the front answered itself, by route and HTTP status."
        requests = CounterMetricFamily("max_ray_front_requests_total", text, labels=["route", "status"])
        for (route, status), number in sorted(self.metrics.requests.items()):
            requests.add_metric([route, str(status)], number)
        return generate_latest(_Families(replicas, requests))


class _Families(Collector):
    def __init__(self, *families: Metric) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """The families as they are."""
        yield from self._families
