"""An application on a cluster that somebody else started outlives its driver; `serve shutdown` ends it whole."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.commands import BIN, OwnCluster, own_cluster, until_said
from tests.serve.conftest import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OURS = ("ray::ModelWorker", "ray::KVManagerActor", "ray::RegistryActor", "ray::ServeReplica")
LEASE_GRACE_S = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[OwnCluster]:
    with own_cluster() as started:
        yield started


def settings(model: Path, port: int) -> list[str]:
    return [f"model_path={model}", f"port={port}", "num_threads=1", f"lease_grace_s={LEASE_GRACE_S}"]


def flags(model: Path, port: int) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in (s.split("=") for s in settings(model, port))]


def answer(port: int) -> str:
    request = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=request, timeout=60)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


def placements(cluster: OwnCluster) -> list[str]:
    """Names of the placement groups that are there."""
    said = cluster.run("ray", "list", "placement-groups", "--format", "json")
    assert said.returncode == 0, said.stderr
    return [row["name"] for row in json.loads(said.stdout) if row["state"] != "REMOVED"]


def shut_down(cluster: OwnCluster, port: int) -> None:
    """`serve shutdown -y`, after which nothing of ours is left in 15 s, while the cluster stays."""
    said = cluster.run("serve", "shutdown", "-y")
    started = time.monotonic()
    assert "Sent shutdown request" in said.stdout + said.stderr
    while left := cluster.processes(*OURS):
        assert time.monotonic() - started < 15, left
        time.sleep(0.1)
    assert placements(cluster) == []
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    assert cluster.processes("ray::DashboardAgent"), "Ray itself goes on"


def test_serve_shutdown_ends_everything_of_ours(cluster: OwnCluster, tiny_llama: Path) -> None:
    port = free_port()
    run = cluster.run("serve", "run", "--non-blocking", "deployments:app", *settings(tiny_llama, port))
    assert run.returncode == 0, run.stderr[-3000:]
    assert answer(port)
    assert len(cluster.processes("ray::ModelWorker")) == 1
    assert len(cluster.processes("ray::RegistryActor")) == 1
    assert [name.startswith("max_ray:default-0-") for name in placements(cluster)] == [True]
    shut_down(cluster, port)


@pytest.mark.parametrize("command", ["serve run", "max-ray serve"])
def test_a_killed_driver_leaves_its_application_serving(
    cluster: OwnCluster, tiny_llama: Path, tmp_path: Path, command: str
) -> None:
    port = free_port()
    line, word = {
        "serve run": ([BIN / "serve", "run", "deployments:app", *settings(tiny_llama, port)], "is ready at"),
        "max-ray serve": ([BIN / "max-ray", "serve", *flags(tiny_llama, port)], "Serving"),
    }[command]
    with until_said(line, word, tmp_path / "log", **cluster.variables) as (process, _):
        expected = answer(port)
        workers = [worker.pid for worker in cluster.processes("ray::ModelWorker")]
        process.kill()
        process.wait(10)
        for _ in range(2 * LEASE_GRACE_S):
            assert answer(port) == expected
            time.sleep(1)
        assert [worker.pid for worker in cluster.processes("ray::ModelWorker")] == workers
    shut_down(cluster, port)
