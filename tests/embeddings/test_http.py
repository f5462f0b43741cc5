"""`/v1/embeddings` over a pipeline of this process: formats, inputs, errors, other tasks, the openai client."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from max_ray.config import PipelineConfig
from max_ray.interfaces import (
    EmbeddingsContext,
    EmbeddingsGenerationOutput,
    EmbeddingsGenerationRequest,
    PipelineTask,
    RequestID,
    TextContext,
    TextGenerationOutput,
)
from max_ray.pipelines import PIPELINE_REGISTRY, EmbeddingsTokenizer
from max_ray.pipelines.factory import PipelineFactory
from max_ray.scheduler import EmbeddingsLoop, LoopActivity, SchedulerLimits
from max_ray.serve.api.metrics import Metrics, MetricsSnapshot
from max_ray.serve.api.model_parsers import ModelParsers
from max_ray.serve.api.routes import build_api
from tests.embeddings.checkpoints import reference_vectors
from tests.embeddings.in_process import embed_in_process

TEXTS = ["Hello", "a longer text, by far", "x"]


class LocalEngine:
    """An Engine of the embeddings task in this process."""

    task = PipelineTask.EMBEDDINGS_GENERATION
    model_name = "tiny"
    model_aliases = ()
    parsers = ModelParsers()
    num_waiting = 0

    def __init__(self, folder: Path) -> None:
        config = PipelineConfig(model_path=str(folder), num_threads=1, max_length=32)
        tokenizer, factory = PIPELINE_REGISTRY.retrieve_factory(config)
        assert isinstance(tokenizer, EmbeddingsTokenizer)
        assert isinstance(factory, PipelineFactory)
        self.tokenizer = tokenizer
        self.embedding_size = factory.plan.embedding_size
        self.metrics = Metrics(self.model_name, "r0")
        pipeline: Any = factory()
        self.loop = EmbeddingsLoop(pipeline, SchedulerLimits(8, 64, 4, 1))

    def embed(self, contexts: Sequence[EmbeddingsContext]) -> Awaitable[list[EmbeddingsGenerationOutput]]:
        return self.loop.submit(contexts)

    def submit(self, context: TextContext) -> AsyncIterator[TextGenerationOutput]:
        raise AssertionError("this engine makes embeddings")

    def cancel(self, request_id: RequestID) -> None:
        raise AssertionError("this engine makes embeddings")

    async def healthy(self) -> bool:
        return self.loop.healthy

    async def metrics_snapshots(self) -> Sequence[MetricsSnapshot]:
        return [self.metrics.snapshot(self.loop.stats)]

    @property
    def activity(self) -> LoopActivity:
        return self.loop.activity


@pytest.fixture
async def engine(tiny_bert: Path) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(tiny_bert)
    task = asyncio.create_task(engine.loop.run())
    yield engine
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def client(engine: LocalEngine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_api(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:
        yield client


async def vectors(client: httpx.AsyncClient, **body: Any) -> list[list[float]]:
    answer = await client.post("/embeddings", json={"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


async def test_every_form_of_input_gives_the_vectors_of_transformers(
    client: httpx.AsyncClient, engine: LocalEngine, tiny_bert: Path
) -> None:
    ids = [engine.tokenizer.encode_text(text).tolist() for text in TEXTS]
    expected = reference_vectors(tiny_bert, ids, "bert")
    for given in (TEXTS, ids):
        assert np.abs(np.array(await vectors(client, input=given)) - expected).max() < 1e-5
    for i, given in [(0, TEXTS[0]), (1, ids[1])]:
        assert np.abs(np.array(await vectors(client, input=given)) - expected[i]).max() < 1e-5


async def test_the_answer_object_and_its_usage(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/embeddings", json={"input": ["ab", "abcd"], "model": None})).json()
    assert {key: answer[key] for key in ("object", "model", "usage")} == {
        "object": "list",
        "model": "tiny",
        "usage": {"prompt_tokens": 8, "total_tokens": 8},
    }
    assert {entry["object"] for entry in answer["data"]} == {"embedding"}


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient) -> None:
    plain = np.array(await vectors(client, input=TEXTS), dtype=np.float32)
    for text, expected in zip(await vectors(client, input=TEXTS, encoding_format="base64"), plain, strict=True):
        assert isinstance(text, str)
        assert np.array_equal(np.frombuffer(base64.b64decode(text), dtype="<f4"), expected)


async def test_dimensions_cut_and_scale_again(client: httpx.AsyncClient) -> None:
    whole = np.array(await vectors(client, input="Hello"))[0]
    for size in (1, 7, 32):
        (short,) = np.array(await vectors(client, input="Hello", dimensions=size))
        assert np.allclose(short, whole[:size] / np.linalg.norm(whole[:size]), atol=1e-6)
        assert abs(np.linalg.norm(short) - 1) < 1e-6


async def test_truncate(client: httpx.AsyncClient) -> None:
    cut = await vectors(client, input="a" * 40, truncate=True)
    assert np.allclose(cut, await vectors(client, input="a" * 31), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "sentence", "param"),
    [
        ({}, 400, "'input' is required", "input"),
        ({"input": []}, 400, "must be a text, a list of texts", "input"),
        ({"input": ["a", 1]}, 400, "must be a text", "input"),
        ({"input": [[1], []]}, 400, "must be a text", "input"),
        ({"input": ""}, 400, "The input is empty", "input"),
        ({"input": ["a", ""]}, 400, "input[1]: The input is empty", "input"),
        ({"input": "a" * 40}, 400, "has 41 tokens, but this model embeds 32 at most", "input"),
        ({"input": [[1, 2], [1, 99999]]}, 400, "input[1]: Token id 99999 is outside", "input"),
        ({"input": ["a"] * 2049}, 400, "2049 inputs are more than 2048", "input"),
        ({"input": "a", "dimensions": 33}, 400, "this model's vectors have 32 numbers", "dimensions"),
        ({"input": "a", "dimensions": 0}, 400, "'dimensions' is not valid", "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 400, "'encoding_format' is not valid", "encoding_format"),
        ({"input": "a", "user": 5}, 400, "'user' is not valid", "user"),
        ({"input": "a", "inputs": "b"}, 400, "Did you mean 'input'?", "inputs"),
        ({"input": "a", "model": "other"}, 404, "not served here", "model"),
    ],
)
async def test_refused(client: httpx.AsyncClient, body: dict[str, Any], status: int, sentence: str, param: str) -> None:
    answer = await client.post("/embeddings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (status, "invalid_request_error", param)
    assert sentence in error["message"]


async def test_the_code_of_an_input_that_is_too_long(client: httpx.AsyncClient) -> None:
    answer = await client.post("/embeddings", json={"input": "a" * 40})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_text_routes_name_the_right_one(client: httpx.AsyncClient) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for route, body in [("completions", {"prompt": "a"}), ("chat/completions", chat)]:
        answer = await client.post(f"/{route}", json=body)
        assert answer.status_code == 400
        assert "makes embeddings and generates no text: use /v1/embeddings" in answer.json()["error"]["message"]


async def test_models_and_metrics(client: httpx.AsyncClient, engine: LocalEngine) -> None:
    await vectors(client, input=["ab", "abcd"])
    (model,) = (await client.get("/models")).json()["data"]
    assert (model["task"], model["max_model_len"]) == ("embeddings_generation", 32)
    text = (await client.get("http://test/metrics")).text
    assert 'max_ray_requests_total{model_name="tiny",replica="r0",route="/v1/embeddings",status="200"} 1' in text
    assert 'max_ray_prompt_tokens_total{model_name="tiny",replica="r0"} 8' in text


async def test_concurrent_requests_share_steps(client: httpx.AsyncClient, engine: LocalEngine, tiny_bert: Path) -> None:
    given = [f"text number {i}" for i in range(12)]
    answers = await asyncio.gather(*[vectors(client, input=text) for text in given])
    expected = await asyncio.to_thread(embed_in_process, tiny_bert, given)
    assert np.abs(np.array([answer[0] for answer in answers]) - expected).max() < 1e-5
    assert engine.loop.stats.steps < len(given)


async def test_a_full_queue_is_a_429(tiny_bert: Path) -> None:
    engine = LocalEngine(tiny_bert)  # its loop does not run
    jobs = [engine.loop.submit(await contexts(engine)) for _ in range(12)]
    transport = httpx.ASGITransport(build_api(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:
        answer = await client.post("/embeddings", json={"input": "a"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    assert answer.json()["error"]["type"] == "queue_full"
    assert not any(job.done() for job in jobs)


async def test_a_client_that_leaves_ends_its_job(tiny_bert: Path) -> None:
    engine = LocalEngine(tiny_bert)  # its loop does not run yet
    body = b'{"input": ["a", "b", "c"]}'
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [], "query_string": b""}
    answering = asyncio.create_task(build_api(engine)(scope, messages.get, send))
    while engine.loop.stats.queued != 3:
        await asyncio.sleep(0.01)
    messages.put_nowait({"type": "http.disconnect"})
    await answering
    assert engine.loop.stats.queued == 0
    assert sent[0]["status"] == 499
    running = asyncio.create_task(engine.loop.run())
    await engine.loop.submit(await contexts(engine))
    assert (engine.loop.stats.cancelled, engine.loop.stats.steps) == (1, 1)
    running.cancel()


async def contexts(engine: LocalEngine) -> list[EmbeddingsContext]:
    return [await engine.tokenizer.new_context(EmbeddingsGenerationRequest(RequestID(), input="a"))]


async def test_the_openai_client(engine: LocalEngine, tiny_bert: Path) -> None:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(build_api(engine)), base_url="http://test/v1")
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)
    expected = await asyncio.to_thread(embed_in_process, tiny_bert, TEXTS)
    answer = await client.embeddings.create(model="tiny", input=TEXTS)
    assert np.abs(np.array([entry.embedding for entry in answer.data]) - expected).max() < 1e-5
    floats = await client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float", dimensions=4)
    assert len(floats.data[0].embedding) == 4
    with pytest.raises(openai.BadRequestError, match="use /v1/embeddings"):
        await client.completions.create(model="tiny", prompt="a")


async def test_ollamas_route_gives_the_same_vectors(client: httpx.AsyncClient) -> None:
    expected = await vectors(client, input=TEXTS)
    for given, rows in ((TEXTS, expected), (TEXTS[0], expected[:1])):
        reply = await client.post("http://test/api/embed", json={"model": "tiny:latest", "input": given})
        answer = reply.json()
        assert np.abs(np.array(answer["embeddings"]) - rows).max() < 1e-6
        assert (answer["model"], answer["load_duration"]) == ("tiny", 0)
    assert answer["prompt_eval_count"] == len(TEXTS[0]) + 1
    short = await client.post("http://test/api/embed", json={"model": "tiny", "input": "a", "dimensions": 8})
    assert len(short.json()["embeddings"][0]) == 8
    long = {"model": "tiny", "input": "a" * 100}
    assert (await client.post("http://test/api/embed", json=long)).status_code == 200, "it is cut off"
    refused = await client.post("http://test/api/embed", json={**long, "truncate": False})
    assert refused.status_code == 400
    assert "tokens" in refused.json()["error"]
    chat = await client.post("http://test/api/chat", json={"model": "tiny", "messages": [{"role": "user"}]})
    assert chat.status_code == 400
    assert "embeddings" in chat.json()["error"]
    shown = (await client.post("http://test/api/show", json={"model": "tiny"})).json()
    assert shown["capabilities"] == ["embedding"]
