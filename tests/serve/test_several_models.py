"""Two models in one application on a real Ray Serve: through HAProxy and the front to the replicas' own ports."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from max_ray.config import ServeConfig
from max_ray.serve.application import build_application
from tests.actors.helpers import actors_of, eventually
from tests.serve.conftest import Served, settings_for

pytestmark = [pytest.mark.ray]
APP = "several"
IDLE_S = 3.0
BODY: dict[str, Any] = {"prompt": "Hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def several(
    ray_cluster: Any, tiny_llama: Path, serve_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """`kept` has a replica; `lazy` has none until it is asked."""
    files = tmp_path_factory.mktemp("files")
    files.chmod(0o700)
    models = (
        {"model_path": str(tiny_llama), "name": "kept", "aliases": ["org/kept"]},
        {"model_path": str(tiny_llama), "name": "lazy", "min_replicas": 0, "scale_to_zero_after_s": IDLE_S},
    )
    settings = settings_for(tiny_llama, serve_port, APP, models=models, files_dir=str(files))
    config = ServeConfig(**{name: settings[name] for name in settings.keys() - {"model_path", "served_model_name"}})
    serve.run(build_application(config), name=APP, route_prefix=f"/{APP}")
    yield Served(serve_port, APP, "kept", f"/{APP}")
    serve.delete(APP)


async def until_status(client: httpx.AsyncClient, path: str, status: int) -> None:
    async with asyncio.timeout(60):
        while (await client.get(path)).status_code != status:
            await asyncio.sleep(0.2)


def groups_of(model: str) -> list[str]:
    return [name for name in actors_of(f"{APP}.Model{['kept', 'lazy'].index(model)}-{model}") if ":worker_" in name]


@pytest.mark.slow
async def test_two_models_one_of_them_asleep(several: Served) -> None:
    async with httpx.AsyncClient(base_url=several.url, headers=several.headers, timeout=90) as client:
        await until_status(client, "/health", 200)
        for path in ("/v1/models", "/metrics", "/v1/server", "/api/tags", "/api/ps", "/health", "/", "/v1/models/lazy"):
            assert (await client.get(path)).status_code == 200, path
        assert (len(groups_of("kept")), groups_of("lazy")) == (1, [])
        reply = await client.post("/v1/completions", json={**BODY, "model": "org/kept"})
        assert reply.status_code == 200, reply.text
        kept = reply.json()
        assert kept["model"] == "kept"

        begin = time.monotonic()
        async with client.stream("POST", "/v1/completions", json={**BODY, "model": "lazy", "stream": True}) as reply:
            assert reply.status_code == 200
            lines = [line async for line in reply.aiter_lines() if line.startswith("data: {")]
        print(f"cold start: {time.monotonic() - begin:.1f} s")
        text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)
        assert text == kept["choices"][0]["text"]
        stored = (
            await client.post("/v1/responses", json={"model": "lazy", "input": "Hi", "max_output_tokens": 8})
        ).json()
        await eventually(lambda: len(groups_of("lazy")) == 1, 5, "it is awake")
        assert 'model_name="lazy"' in (await until_metrics(client))

        await eventually(lambda: not groups_of("lazy"), 60, "an idle model gives its group back")
        assert len(groups_of("kept")) == 1
        assert (await client.get(f"/v1/responses/{stored['id']}")).json()["model"] == "lazy"
        assert (await client.get("/v1/models/lazy")).status_code == 200
        await asyncio.sleep(2)
        assert groups_of("lazy") == []
        again = (await client.post("/v1/completions", json={**BODY, "model": "lazy"})).json()
        assert again["choices"] == kept["choices"]


async def until_metrics(client: httpx.AsyncClient) -> str:
    async with asyncio.timeout(10):
        while 'requests_total{model_name="lazy"' not in (text := (await client.get("/metrics")).text):
            await asyncio.sleep(0.2)
    return text


async def test_refusals_hang_ups_and_batches(several: Served) -> None:
    async with httpx.AsyncClient(base_url=several.url, headers=several.headers, timeout=90) as client:
        reply = await client.post("/v1/completions", json={**BODY, "model": "other"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
        reply = await client.post("/v1/completions", json={**BODY, "model": "kept"}, headers={"Authorization": ""})
        assert reply.status_code == 401
        long = {**BODY, "model": "kept", "max_tokens": 230, "stream": True}
        async with client.stream("POST", "/v1/completions", json=long) as reply:
            await anext(reply.aiter_raw())
        async with asyncio.timeout(10):
            while 'route="/v1/completions",status="499"} 1' not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.2)

        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {**BODY, "model": name}}
            for name in ("kept", "lazy", "other")
        ]
        content = "\n".join(map(json.dumps, lines)).encode()
        uploaded = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})
        body = {"input_file_id": uploaded.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = (await client.post("/v1/batches", json=body)).json()
        async with asyncio.timeout(90):
            while batch["status"] not in ("completed", "failed"):
                await asyncio.sleep(0.5)
                batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
        assert (batch["request_counts"]["completed"], batch["request_counts"]["failed"]) == (2, 1)
        results = (await client.get(f"/v1/files/{batch['output_file_id']}/content")).text.splitlines()
        assert {json.loads(line)["response"]["body"]["model"] for line in results} == {"kept", "lazy"}
