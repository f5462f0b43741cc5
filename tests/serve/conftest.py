"""One served application for the tests of this folder: tiny model, one rank, API keys."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

KEY = "key-of-the-tests"


@dataclass(frozen=True)
class Served:
    """A running application."""

    port: int
    app_name: str
    model: str
    route_prefix: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.route_prefix}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def sync_client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def serve_port() -> int:
    """Serve has one HTTP port a cluster; the first application decides."""
    return free_port()


def settings_for(model: Path, port: int, app_name: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_path": str(model),
        "served_model_name": "tiny",
        "port": port,
        "app_name": app_name,
        "devices": "cpu",
        "num_threads": 1,
        "max_batch_size": 32,
        "kv_cache_page_size": 4,
        "max_num_steps": 16,
        "api_keys": (KEY,),
        **changes,
    }


@pytest.fixture(scope="module")
def served(ray_cluster: Any, tiny_llama: Path, serve_port: int) -> Iterator[Served]:
    from ray import serve

    from max_ray.config import ServeConfig
    from max_ray.serve.application import build_application

    application = build_application(ServeConfig(**settings_for(tiny_llama, serve_port, "tiny-app")))
    serve.run(application, name="tiny-app", route_prefix="/")
    yield Served(serve_port, "tiny-app", "tiny")
    serve.delete("tiny-app")
