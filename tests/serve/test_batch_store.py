"""Batches on a real Serve with two replicas, of which one dies, and so does the store."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
import ray

from max_ray.actors.messages import NAMESPACE
from max_ray.serve.api.batches.store import BatchMissingError
from max_ray.serve.batch_store import ActorBatchStore, actor_name
from tests.actors.helpers import eventually, kill
from tests.http.batch_servers import jsonl, line, parsed
from tests.serve.applications import deployed, replica_processes

pytestmark = [pytest.mark.ray]
COMPLETIONS = "/v1/completions"


async def test_errors_cross_the_border(ray_cluster: Any, tmp_path: Path) -> None:
    store = ActorBatchStore("batch-test", str(tmp_path / "files"), 2**20)
    with pytest.raises(BatchMissingError, match="There is no batch") as caught:
        await store.find_batch("batch_x")
    assert caught.value.param == "batch_id"
    file_id = await store.begin_upload("a")
    await store.append_upload(file_id, b"abc")
    await store.complete_upload(file_id, "batch", None)
    kill(ray.get_actor(actor_name("batch-test"), namespace=NAMESPACE))
    async with asyncio.timeout(60):
        while await store.read_file(file_id, 0, 10) != b"abc":
            await asyncio.sleep(0.1)
    assert (await store.find_file(file_id))["bytes"] == 3
    kill(ray.get_actor(actor_name("batch-test"), namespace=NAMESPACE))


@pytest.mark.slow
async def test_a_batch_outlives_a_replica_and_its_store(
    ray_cluster: Any, tiny_llama: Path, serve_port: int, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    settings = {"min_replicas": 2, "max_replicas": 2, "files_dir": str(folder), "batch_concurrency": 2}
    lines = [line(f"id-{i}", {"prompt": f"{i}", "max_tokens": 20}, COMPLETIONS) for i in range(300)]
    async with deployed(tiny_llama, serve_port, "batch-app", **settings) as served:
        await eventually(lambda: len(replica_processes("batch-app")) == 2, 60, "two replicas")
        client = served.client()
        file = await client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
        batch: Any = await client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
        batch = await _until(client, batch.id, 20)
        assert batch.status == "in_progress"
        os.kill(replica_processes("batch-app")[0].pid, signal.SIGKILL)
        batch = await _until(client, batch.id, batch.request_counts.completed + 40)
        assert batch.status == "in_progress"
        kill(ray.get_actor(actor_name("batch-app"), namespace=NAMESPACE))
        batch = await _until(client, batch.id, 300)
        assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 300, 0)
        async with served.client() as other:
            results = parsed((await other.files.content(batch.output_file_id)).content)
        assert sorted(one["custom_id"] for one in results) == sorted(one["custom_id"] for one in lines)
        assert {one["response"]["status_code"] for one in results} == {200}


async def _until(client: openai.AsyncOpenAI, batch_id: str, num_completed: int) -> Any:
    """The batch, once it has ended or so many lines are done. A replica that dies may take a question with it."""
    async with asyncio.timeout(180):
        while True:
            try:
                batch = await client.batches.retrieve(batch_id)
            except (openai.InternalServerError, openai.APIConnectionError):
                await asyncio.sleep(0.2)
                continue
            if batch.status == "completed" or (
                batch.request_counts and batch.request_counts.completed >= num_completed
            ):
                return batch
            assert batch.status != "failed", batch
            await asyncio.sleep(0.02)
