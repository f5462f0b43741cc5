"""Fixtures for all tests: the session's one Ray cluster, and a tiny model to serve on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer; its heads divide by 2."""
    from tests.checkpoints import make_llama

    return make_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A Ray of this session's own, with Serve's switches set as for a laptop; all of it is gone afterwards."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine is no failure
    import psutil
    import ray
    from ray import serve

    from max_ray.config import ServeConfig
    from max_ray.serve.cluster_env import serve_environment

    environment = serve_environment(ServeConfig())
    ray.init(num_cpus=4, runtime_env={"env_vars": environment}, log_to_driver=False)
    mine = psutil.Process()
    yield ray
    serve.shutdown()
    started = mine.children(recursive=True)
    ray.shutdown()
    _, alive = psutil.wait_procs(started, timeout=15)
    left = [" ".join(process.cmdline()) for process in alive]
    left = [command for command in left if "resource_tracker" not in command]  # other tests' multiprocessing
    assert not left, f"left behind: {left}"
