"""Embeddings through a worker actor: over HTTP on Serve, no KV manager, a worker that dies."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import ray
from ray import serve

from max_ray.actors.messages import NAMESPACE
from max_ray.config import ServeConfig
from max_ray.serve.api.embeddings import EmbeddingsRequest
from max_ray.serve.application import build_application
from tests.actors.helpers import actors_of, eventually, kill
from tests.embeddings.checkpoints import make_encoder
from tests.embeddings.in_process import embed_in_process
from tests.serve.applications import running
from tests.serve.conftest import Served, settings_for

pytestmark = [pytest.mark.ray]

TEXTS = ["Hello", "a longer text, by far", "x", "a text of many words, and one more"]


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    return make_encoder(tmp_path / "tiny-bert", "bert")


async def test_a_served_encoder(ray_cluster: Any, tiny_bert: Path, serve_port: int) -> None:
    code = ("architectures.bert",)
    expected = await asyncio.to_thread(embed_in_process, tiny_bert, TEXTS, custom_architectures=code)
    settings = settings_for(tiny_bert, serve_port, "embed", custom_architectures=code)
    async with running(build_application(ServeConfig(**settings)), settings["port"], "embed") as served:
        assert not any("kv_manager" in name for name in actors_of("embed"))
        assert len(actors_of("embed")) == 1
        client = served.client()

        async def vectors(texts: list[str]) -> Any:
            answer = await client.embeddings.create(model="tiny", input=texts)
            return np.array([entry.embedding for entry in answer.data])

        assert np.abs(await vectors(TEXTS) - expected).max() < 1e-5
        many = await asyncio.gather(*[vectors([text]) for text in TEXTS * 8])
        assert np.abs(np.concatenate(many) - np.tile(expected, (8, 1))).max() < 1e-5
        with pytest.raises(openai.BadRequestError, match="use /v1/embeddings"):
            await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
        handle: Any = serve.get_app_handle("embed")
        answer = await handle.embed.remote(EmbeddingsRequest(input=TEXTS[0]))
        assert answer["usage"]["prompt_tokens"] == len(TEXTS[0]) + 1
        await hang_up_and_run_out_of_time(served)
        old = set(actors_of("embed"))
        kill(ray.get_actor(sorted(old)[0], namespace=NAMESPACE))
        assert np.abs(await vectors(TEXTS) - expected).max() < 1e-5
        await eventually(lambda: len(set(actors_of("embed")) - old) == 1, 20, "a new worker")
    await eventually(lambda: not actors_of("embed"), 20, "the group ends with its application")


async def hang_up_and_run_out_of_time(served: Served) -> None:
    """Both end the job and are counted as what they are."""
    many = {"input": ["many words " * 4] * 2048}
    async with httpx.AsyncClient(base_url=served.url, headers=served.headers, timeout=30) as client:
        late = await client.post("/v1/embeddings", json=many, headers={"x-request-timeout-seconds": "0.02"})
        assert (late.status_code, late.json()["error"]["code"]) == (408, "request_timeout")
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/embeddings", json=many, timeout=httpx.Timeout(10, read=0.05))

        async def counted() -> bool:
            text = (await client.get("/metrics")).text
            counts = dict(re.findall(r'requests_total\{[^}]*route="/v1/embeddings",status="(\d+)"\} (\d+)', text))
            return (counts.get("408"), counts.get("499"), counts.get("500")) == ("1", "1", None)

        async with asyncio.timeout(10):
            while not await counted():
                await asyncio.sleep(0.05)
