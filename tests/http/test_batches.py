"""/v1/files and /v1/batches with the official client: uploads, whole batches, ends, restarts, two replicas."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from max_ray.errors import ConfigError, QueueFullError, WorkerGroupError
from max_ray.serve.api.batches import runner as runner_module
from max_ray.serve.api.batches import store as store_module
from max_ray.serve.api.batches.state import DEAD_AFTER_S
from max_ray.serve.api.batches.store import LocalBatchStore
from max_ray.serve.api.files.directory import FileDirectory
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.http.batch_servers import Clock, Server, chat, jsonl, line, opened_store, parsed
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(store_module, "RESUME_AFTER_S", 0.05)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalBatchStore]:
    async with opened_store(tmp_path / "files") as store:
        yield store


@pytest.fixture
async def server(engine: FakeEngine, store: LocalBatchStore) -> AsyncIterator[Server]:
    server = Server(engine, store)
    server.runner.start()
    yield server
    await server.runner.close()


async def begun(client: openai.AsyncOpenAI, lines: list[Any], endpoint: Any = CHAT, **options: Any) -> Any:
    file = await client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)


async def ended(client: openai.AsyncOpenAI, batch: Any) -> Any:
    async with asyncio.timeout(20):
        while batch.status in ("validating", "in_progress", "finalizing"):
            await asyncio.sleep(0.005)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def content_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else parsed((await client.files.content(file_id)).content)


def spoken(context: Any) -> str:
    return f"got {len(context.tokens)}"


async def test_files(server: Server, tmp_path: Path) -> None:
    client = server.client()
    content = random.Random(1).randbytes(3_000_000)
    file = await client.files.create(file=("ä.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose, file.object) == ("ä.jsonl", len(content), "batch", "file")
    assert (await client.files.content(file.id)).content == content
    other = await client.files.create(
        file=("b", b""), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert other.expires_at == other.created_at + 3600
    assert [one.id async for one in client.files.list()] == [other.id, file.id]
    assert [one.id async for one in client.files.list(order="asc", limit=1)] == [file.id, other.id]
    assert [one.id async for one in client.files.list(purpose="batch_output")] == []
    assert (await client.files.retrieve(file.id)) == file
    assert (await client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError, match="There is no file"):
        await client.files.content(file.id)
    with pytest.raises(openai.NotFoundError):
        await client.files.delete(file.id)
    folder = tmp_path / "files"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize(
    ("files", "data", "word"),
    [
        ({"file": ("a", b"x")}, {}, "purpose"),
        ({"file": ("a", b"x")}, {"purpose": "fine-tune"}, "purpose"),
        ({"other": ("a", b"x")}, {"purpose": "batch"}, "other"),
        ({}, {"purpose": "batch"}, "multipart"),
        ({"purpose": (None, b"batch")}, {}, "no file"),
        ({"purpose": (None, b"p" * 2000)}, {}, "too long"),
        ({"file": (None, b"x")}, {"purpose": "batch"}, "filename"),
        ({"file": ("a", b"x")}, {"purpose": "batch", "expires_after[anchor]": "now"}, "anchor"),
        (
            {"file": ("a", b"x")},
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
            "3600",
        ),
    ],
)
async def test_uploads_that_are_refused(
    server: Server, store: LocalBatchStore, tmp_path: Path, files: Any, data: Any, word: str
) -> None:
    async with server.http() as http:
        reply = await http.post("/v1/files", files=files or None, data=data)
        assert reply.status_code in (400, 415), reply.text
        assert word in reply.text
        assert (await http.get("/v1/files")).json()["data"] == []
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["lock"]


async def test_bounds_of_the_folder(engine: FakeEngine, tmp_path: Path) -> None:
    async with opened_store(tmp_path / "f", max_bytes=1000, max_files=3, max_file_bytes=600) as store:
        client = Server(engine, store).client()
        for size, is_taken in ((601, False), (600, True), (401, False), (400, True), (1, False)):
            upload = client.files.create(file=("a", b"x" * size), purpose="batch")
            if is_taken:
                await upload
            else:
                with pytest.raises(openai.APIStatusError) as caught:
                    await upload
                assert caught.value.status_code == 413
        for file in await store.files():
            await store.delete_file(file["id"])
        for _ in range(3):
            await client.files.create(file=("a", b""), purpose="batch")
        with pytest.raises(openai.APIStatusError, match="3 files"):
            await client.files.create(file=("a", b""), purpose="batch")


async def test_foreign_pages_upload_nothing(server: Server) -> None:
    form: dict[str, Any] = {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch"}}
    async with server.http() as http:
        for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "same-origin"}):
            assert (await http.post("/v1/files", headers=headers, **form)).status_code in (403, 415)
        assert (await http.post("/v1/batches", **form)).status_code == 415
        assert (await http.post("/v1/files", headers={"Origin": "http://test"}, **form)).status_code == 200


async def test_without_a_folder_every_route_says_so(engine: FakeEngine, client: Any) -> None:
    for method, path in (
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/files/a"),
        ("DELETE", "/v1/files/a"),
        ("GET", "/v1/files/a/content"),
        ("GET", "/v1/batches"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/batches/a"),
        ("POST", "/v1/batches/a/cancel"),
    ):
        error = error_of(await client.request(method, path), 404)
        assert "--files-dir" in error["message"], path


async def test_a_batch(server: Server, engine: FakeEngine) -> None:
    engine.script = spoken
    client = server.client()
    lines = [chat(f"id-{i}", "x" * i) for i in range(40)] + [chat("bad", top_p=9.0)]
    batch = await begun(client, lines, metadata={"a": "b"})
    assert (batch.status, batch.object, batch.metadata) == ("validating", "batch", {"a": "b"})
    batch = await ended(client, batch)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (41, 40, 1)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert {context.priority for context in engine.contexts} == {runner_module.PRIORITY}
    outputs = {one["custom_id"]: one for one in await content_of(client, batch.output_file_id)}
    assert outputs.keys() == {f"id-{i}" for i in range(40)}
    for i in range(40):
        reply = outputs[f"id-{i}"]["response"]
        alone = await client.chat.completions.create(**lines[i]["body"])
        assert reply["status_code"] == 200
        assert reply["body"]["choices"][0]["message"]["content"] == alone.choices[0].message.content
        assert reply["body"]["usage"] == alone.usage.model_dump(exclude_unset=True)
    (failed,) = await content_of(client, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("bad", 400)
    assert failed["response"]["body"]["error"]["param"] == "top_p"
    file = await client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert [one.id async for one in client.batches.list(limit=1)] == [batch.id]


async def test_each_route(server: Server) -> None:
    client = server.client()
    bodies = {
        "/v1/completions": {"prompt": ["a", "b"], "n": 2},
        "/v1/responses": {"input": "a"},
        "/v1/embeddings": {"input": "a"},
        CHAT: {"messages": [{"role": "user", "content": "a"}]},
    }
    for url, body in bodies.items():
        batch = await ended(client, await begun(client, [line("a", body, url)], url))
        assert batch.status == "completed"
        results = await content_of(client, batch.output_file_id or batch.error_file_id)
        assert results[0]["response"]["status_code"] == (400 if url == "/v1/embeddings" else 200)
        if url == "/v1/completions":
            assert len(results[0]["response"]["body"]["choices"]) == 4
        if url == "/v1/responses":
            with pytest.raises(openai.NotFoundError):  # a batch fills no store of responses
                await client.responses.retrieve(results[0]["response"]["body"]["id"])


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        (b"", [(None, "no line")]),
        (b"\n \n", [(None, "no line")]),
        (jsonl([chat("a"), chat("b"), chat("a")]), [(3, "two lines")]),
        (b"\n" + jsonl([chat("a")]) + b"{\n" + b"[]\n", [(3, "JSON"), (4, "object")]),
        (jsonl([line("a", {}, "/v1/completions")]), [(1, "url must be '/v1/chat/completions'")]),
        (jsonl([chat("a") | {"method": "GET"}]), [(1, "method")]),
        (jsonl([chat("a") | {"x": 1}]), [(1, "'x'")]),
        (jsonl([chat("", "a"), chat("a" * 513)]), [(1, "custom_id"), (2, "custom_id")]),
        (jsonl([line("a", "text")]), [(1, "body")]),
        (jsonl([chat("a", stream=True)]), [(1, "stream")]),
    ],
)
async def test_input_files_with_mistakes(server: Server, content: bytes, problems: list[Any]) -> None:
    client = server.client()
    file = await client.files.create(file=("a", content), purpose="batch")
    batch: Any = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    batch = await ended(client, batch)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert [one.line for one in batch.errors.data] == [number for number, _ in problems]
    for found, (_, word) in zip(batch.errors.data, problems, strict=True):
        assert word in found.message


async def test_bodies_that_are_refused(server: Server) -> None:
    client = server.client()
    file = await client.files.create(file=("a", jsonl([chat("a")])), purpose="batch")
    good: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    for changes, param in (
        ({"input_file_id": "file-x"}, "input_file_id"),
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"extra_body": {"colour": 1}}, "colour"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.batches.create(**{**good, **changes})  # type: ignore[dict-item]
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        await client.batches.retrieve("batch_x")


async def test_cancel_keeps_what_is_done(server: Server, engine: FakeEngine) -> None:
    client = server.client()
    engine.script = lambda context: "h" if len(engine.contexts) <= 3 else "hello"
    engine.gate = asyncio.Event()
    batch = await begun(client, [chat(f"id-{i}", max_tokens=1 if i < 3 else 5) for i in range(30)])
    while batch.request_counts.completed < 3:
        await asyncio.sleep(0.005)
        batch = await client.batches.retrieve(batch.id)
    with pytest.raises(openai.BadRequestError, match="cancel the batch"):
        await client.files.delete(batch.input_file_id)
    batch = await client.batches.cancel(batch.id)
    assert batch.status == "cancelled"
    assert len(await content_of(client, batch.output_file_id)) == 3
    async with asyncio.timeout(5):
        while len(engine.cancelled) < len(engine.contexts) - 3:
            await asyncio.sleep(0.005)
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        await client.batches.cancel(batch.id)
    await client.files.delete(batch.input_file_id)


async def test_a_batch_expires(engine: FakeEngine, tmp_path: Path) -> None:
    clock = Clock()
    async with opened_store(tmp_path / "f", clock) as store:
        server = Server(engine, store)
        client = server.client()
        engine.gate = asyncio.Event()
        server.runner.start()
        expires: Any = {"anchor": "created_at", "seconds": 3600}
        lines = [chat("quick", max_tokens=1), chat("slow")]
        batch = await begun(client, lines, output_expires_after=expires)
        while batch.request_counts.completed < 1:
            await asyncio.sleep(0.005)
            batch = await client.batches.retrieve(batch.id)
        clock.now += 24 * 3600
        batch = await client.batches.retrieve(batch.id)
        assert batch.status == "expired"
        (failed,) = await content_of(client, batch.error_file_id)
        assert (failed["custom_id"], failed["error"]["code"]) == ("slow", "batch_expired")
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
        clock.now += 3600
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(batch.output_file_id)
        assert (await client.files.retrieve(batch.input_file_id)).id == batch.input_file_id
        await server.runner.close()


async def test_interactive_requests_come_first(server: Server, engine: FakeEngine) -> None:
    client = server.client()
    engine.gate = asyncio.Event()
    engine.num_waiting = 1
    batch = await begun(client, [chat(f"id-{i}") for i in range(50)])
    await asyncio.sleep(0.1)
    assert engine.contexts == []
    engine.num_waiting = 0
    await asyncio.sleep(0.1)
    assert len(engine.contexts) == 8
    engine.num_waiting = 1
    engine.gate.set()
    await asyncio.sleep(0.1)
    assert len(engine.contexts) == 8
    engine.num_waiting = 0
    assert (await ended(client, batch)).request_counts.completed == 50


async def test_choices_count(server: Server, engine: FakeEngine) -> None:
    client = server.client()
    engine.gate = asyncio.Event()
    most = 0

    def script(context: Any) -> str:
        nonlocal most
        most = max(most, sum(not one.is_done for one in engine.contexts))
        return "ab"

    engine.script = script
    batch = await begun(client, [chat(f"id-{i}", n=3) for i in range(9)] + [chat("big", n=20)])
    engine.gate.set()
    batch = await ended(client, batch)
    assert batch.request_counts.completed == 10
    assert most == 20
    outputs = await content_of(client, batch.output_file_id)
    assert {one["custom_id"]: len(one["response"]["body"]["choices"]) for one in outputs}["big"] == 20


async def test_a_full_queue_and_dead_workers_are_waited_for(
    server: Server, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_LONGEST_WAIT_S", 0.01)
    client = server.client()
    for refusal in (QueueFullError("full", retry_after=1.0), WorkerGroupError("dead")):
        engine.refuse = refusal
        batch = await begun(client, [chat("a")])
        await asyncio.sleep(0.05)
        assert (await client.batches.retrieve(batch.id)).status == "in_progress"
        engine.refuse = None
        assert (await ended(client, batch)).request_counts.completed == 1
    engine.refuse = WorkerGroupError("dead")
    batch = await ended(client, await begun(client, [chat("a")]))
    (failed,) = await content_of(client, batch.error_file_id)
    assert failed["response"]["status_code"] == 503


async def test_a_fault_of_ours_is_one_line(server: Server, engine: FakeEngine) -> None:
    engine.failure = RuntimeError("bug")
    client = server.client()
    batch = await ended(client, await begun(client, [chat("a"), chat("b")]))
    assert (batch.status, batch.request_counts.failed) == ("completed", 2)
    failed = await content_of(client, batch.error_file_id)
    assert [one["response"]["status_code"] for one in failed] == [500, 500]


@pytest.mark.parametrize("seed", range(50))
async def test_two_replicas_of_which_one_dies(
    engine: FakeEngine, tokenizer: TextTokenizer, store: LocalBatchStore, seed: int
) -> None:
    """Every line has one result, whichever replica dies and whenever; what was done is not run again."""
    rng = random.Random(seed)
    engines = [engine, FakeEngine(tokenizer, lambda context: "other")]
    servers = [Server(one, store, f"r{i}", rng.randrange(1, 9)) for i, one in enumerate(engines)]
    for one in servers:
        one.runner.start()
    client = servers[0].client()
    lines = [chat(f"id-{i}") for i in range(rng.randrange(5, 40))]
    batch = await begun(client, lines)
    for _ in range(rng.randrange(60)):
        await asyncio.sleep(0)
    dead, alive = rng.sample(servers, 2)
    await dead.runner.close()
    batch = await ended(alive.client(), batch)
    assert (batch.status, batch.request_counts.completed) == ("completed", len(lines))
    outputs = await content_of(alive.client(), batch.output_file_id)
    assert sorted(one["custom_id"] for one in outputs) == sorted(one["custom_id"] for one in lines)
    assert sum(len(one.contexts) for one in engines) <= len(lines) + 8
    await alive.runner.close()


async def test_a_silent_runner_loses_its_lines(tmp_path: Path) -> None:
    clock = Clock()
    async with opened_store(tmp_path / "f", clock) as store:
        batch_id = await in_progress(store, 3)
        first = await store.claim("a", 2, [])
        keys = [one.key for one in first.lines]
        assert keys == [(batch_id, 0), (batch_id, 1)]
        assert [one.key for one in (await store.claim("b", 5, [])).lines] == [(batch_id, 2)]
        clock.now += DEAD_AFTER_S - 1
        assert (await store.claim("a", 0, keys[:1])).unwanted == []
        clock.now += 1
        assert [one.key for one in (await store.claim("c", 5, [])).lines] == [(batch_id, 2), (batch_id, 1)]
        assert (await store.claim("a", 0, keys)).unwanted == [(batch_id, 1)]
        assert await store.finish("a", keys[1], True, b'{"custom_id":"id-1"}\n')  # the first result counts
        assert not await store.finish("c", keys[1], True, b'{"custom_id":"id-1"}\n')
        assert (await store.claim("c", 0, [keys[1], ("batch_x", 0)])).unwanted == [("batch_x", 0), keys[1]]


async def in_progress(store: LocalBatchStore, num_lines: int) -> str:
    file_id = await store.begin_upload("a")
    await store.append_upload(file_id, jsonl([chat(f"id-{i}") for i in range(num_lines)]))
    await store.complete_upload(file_id, "batch", None)
    batch_id = str((await store.create_batch(CHAT, file_id, None, None))["id"])
    while (await store.find_batch(batch_id))["status"] == "validating":
        await asyncio.sleep(0.001)
    return batch_id


@pytest.mark.parametrize("seed", range(20))
async def test_a_store_that_dies_is_taken_up(engine: FakeEngine, tmp_path: Path, seed: int) -> None:
    """Lines with a result are not run again; a result that was torn is."""
    rng = random.Random(seed)
    num_done = rng.randrange(1, 10)
    async with opened_store(tmp_path / "f") as store:
        batch_id = await in_progress(store, 10)
        lines = (await store.claim("dead", 10, [])).lines
        for one in rng.sample(lines, num_done):
            result = jsonl([{"id": "x", "custom_id": one.request.custom_id, "response": "first"}])
            assert await store.finish("dead", one.key, rng.random() < 0.7, result)
        counts = (await store.find_batch(batch_id))["request_counts"]
        part = await store.begin_upload("half")
        await store.append_upload(part, b"x")
    torn = tmp_path / "f" / f"{batch_id}.output"
    torn.write_bytes(torn.read_bytes() + b'{"id": "y", "custom_id": "id-')
    async with opened_store(tmp_path / "f") as store:
        assert not list((tmp_path / "f").glob("*.part"))
        server = Server(engine, store)
        server.runner.start()
        client = server.client()
        batch = await ended(client, await client.batches.retrieve(batch_id))
        assert batch.status == "completed"
        assert len(engine.contexts) == 10 - num_done
        assert batch.request_counts.failed == counts["failed"]
        results = await content_of(client, batch.output_file_id) + await content_of(client, batch.error_file_id)
        assert sorted(one["custom_id"] for one in results) == [f"id-{i}" for i in range(10)]
        await server.runner.close()
        size = sum(file["bytes"] for file in await store.files())
        assert store._files.num_bytes == size
    async with opened_store(tmp_path / "f") as store:
        assert (await store.find_batch(batch_id))["status"] == "completed"


async def test_a_death_while_results_become_files(engine: FakeEngine, tmp_path: Path) -> None:
    async with opened_store(tmp_path / "f") as store:
        batch_id = await in_progress(store, 2)
        for one in (await store.claim("a", 2, [])).lines:
            await store.finish("a", one.key, True, jsonl([{"custom_id": one.request.custom_id}]))
        done = await store.find_batch(batch_id)
    path = tmp_path / "f" / f"{batch_id}.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"status": "finalizing", "output_file_id": None}))
    (tmp_path / "f" / f"{done['output_file_id']}.json").unlink()
    async with opened_store(tmp_path / "f") as store:
        again = await store.find_batch(batch_id)
        assert again == done
        assert len(parsed(await store.read_file(again["output_file_id"], 0, 10**6))) == 2


async def test_no_room_for_results_fails_the_batch(engine: FakeEngine, tmp_path: Path) -> None:
    async with opened_store(tmp_path / "f", max_bytes=2500) as store:
        server = Server(engine, store, concurrency=1)
        server.runner.start()
        client = server.client()
        batch = await ended(client, await begun(client, [chat(f"id-{i}") for i in range(10)]))
        assert batch.status == "failed"
        assert batch.errors.data[0].code == "storage_full"
        assert len(await content_of(client, batch.output_file_id)) == batch.request_counts.completed > 0
        assert store._files.num_bytes <= 2500
        await server.runner.close()


async def test_folders_that_are_refused(tmp_path: Path) -> None:
    async with opened_store(tmp_path / "f"):
        with pytest.raises(ConfigError, match="another server"):
            FileDirectory(tmp_path / "f", max_bytes=100)
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="700"):
        FileDirectory(tmp_path / "open", max_bytes=100)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        FileDirectory(tmp_path / "file", max_bytes=100)
