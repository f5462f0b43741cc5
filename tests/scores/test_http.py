"""`/v1/score` and `/v1/rerank` over models of this process: shapes, order, bounds, other tasks, cosines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from max_ray.config import PipelineConfig
from max_ray.interfaces import PipelineTask
from max_ray.serve.api.routes import build_api
from max_ray.serve.api.score import MAX_PAIRS, RERANK_PATHS, SCORE_PATHS
from max_ray.serve.local_engine import LocalEngine
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.embeddings.checkpoints import make_encoder
from tests.embeddings.in_process import embed_in_process
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of
from tests.scores.checkpoints import Pair, Values, make_model, scores_in_process

QUERY, DOCUMENTS = "what is it", ["a", "yes?", "no, not at all", "it is"]


async def expected_of(folder: Path, pairs: list[Pair], most: int | None = None) -> Values:
    return await asyncio.to_thread(scores_in_process, folder, pairs, most)


@asynccontextmanager
async def served(folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    config = PipelineConfig(
        model_path=str(folder), served_model_name="tiny", quantization_encoding="float32", num_threads=1, **settings
    )
    engine = await asyncio.to_thread(LocalEngine.load, config)
    engine.start()
    transport = httpx.ASGITransport(build_api(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    await engine.close()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bert") / "model", "bert")


@pytest.fixture
async def client(bert: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with served(bert) as client:
        yield client


async def asked(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    reply = await client.post(path, json={"model": "tiny", **body})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


@pytest.mark.parametrize("path", RERANK_PATHS)
async def test_rerank(client: httpx.AsyncClient, bert: Path, path: str) -> None:
    expected = await expected_of(bert, [(QUERY, document) for document in DOCUMENTS])
    answer = await asked(client, path, query=QUERY, documents=[*DOCUMENTS[:2], {"text": DOCUMENTS[2]}, DOCUMENTS[3]])
    order = [result["index"] for result in answer["results"]]
    assert order == np.argsort(-expected).tolist()
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-6)
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    num_tokens = sum(len(QUERY) + len(document) + 3 for document in DOCUMENTS)
    assert num_tokens - 4 <= answer["usage"]["total_tokens"] <= num_tokens  # "yes" and "no" are one token each
    assert (answer["model"], answer["id"][:7]) == ("tiny", "rerank-")
    few = await asked(client, path, query=QUERY, documents=DOCUMENTS, top_n=2, return_documents=False)
    assert [set(result) for result in few["results"]] == [{"index", "relevance_score"}] * 2
    assert [result["index"] for result in few["results"]] == order[:2]


@pytest.mark.parametrize("path", SCORE_PATHS)
async def test_score(client: httpx.AsyncClient, bert: Path, path: str) -> None:
    cases: list[tuple[Any, Any, list[tuple[str, str]]]] = [
        ("a", "b", [("a", "b")]),
        (["a"], ["b", "c"], [("a", "b"), ("a", "c")]),
        (["a", "b"], ["c", "d"], [("a", "c"), ("b", "d")]),
    ]
    for first, second, pairs in cases:
        answer = await asked(client, path, text_1=first, text_2=second)
        assert [entry["index"] for entry in answer["data"]] == list(range(len(pairs)))
        found = [entry["score"] for entry in answer["data"]]
        assert found == pytest.approx((await expected_of(bert, pairs)).tolist(), abs=1e-6)
        assert answer["usage"]["prompt_tokens"] == 5 * len(pairs)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * (MAX_PAIRS + 1)}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a", "b" * 200]}, "documents[1]"),
        ("/v1/rerank", {"query": "a", "documents": [{"txt": "a"}]}, "documents[0].str"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "model": "other"}, "model"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "max_tokens_per_doc": 5}, "max_tokens_per_doc"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "instruction": "x"}, "instruction"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 97}, "truncate_prompt_tokens"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("/v1/score", {"text_1": "a", "text_2": "\ud800"}, None),
    ],
)
async def test_what_is_refused(client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str | None) -> None:
    reply = await client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = error_of(reply, 404 if param == "model" else 400)
    if param is not None:
        assert error["param"] == param, error


async def test_long_pairs_are_cut_where_asked(client: httpx.AsyncClient, bert: Path) -> None:
    pairs = [("a" * 100, "b" * 300)]
    for limit, most in ((-1, 96), (96, 96), (20, 20)):
        answer = await asked(client, "/score", text_1=pairs[0][0], text_2=pairs[0][1], truncate_prompt_tokens=limit)
        assert answer["usage"]["prompt_tokens"] == most
        assert answer["data"][0]["score"] == pytest.approx((await expected_of(bert, pairs, most))[0], abs=1e-6)


async def test_an_embedding_model_gives_the_cosine(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_encoder(folder, "bert", pooling="mean", normalize=False)
    async with served(folder) as client:
        answer = await asked(client, "/v1/score", text_1="a", text_2=["a", "b", "ab c"])
        vectors = await asyncio.to_thread(embed_in_process, folder, ["a", "b", "ab c"])
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        assert [entry["score"] for entry in answer["data"]] == pytest.approx((units @ units[0]).tolist(), abs=1e-5)
        ranked = await asked(client, "/rerank", query="a", documents=["b", "a"])
        assert ranked["results"][0]["index"] == 1
        assert ranked["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-6)
        long = {"text_1": "a", "text_2": "b" * 500}
        error_of(await client.post("/score", json=long), 400)
        await asked(client, "/score", **long, truncate_prompt_tokens=-1)
        error = error_of(await client.post("/score", json={**long, "truncate_prompt_tokens": 5}), 400)
        assert error["param"] == "truncate_prompt_tokens"


async def test_other_tasks_say_where_to_go(client: httpx.AsyncClient, byte_tokenizer: TextTokenizer) -> None:
    error = error_of(await client.post("/v1/completions", json={"prompt": "a"}), 400)
    assert "/v1/score" in error["message"]
    assert "/v1/score" in error_of(await client.post("/v1/embeddings", json={"input": "a"}), 400)["message"]
    writer = FakeEngine(byte_tokenizer, lambda context: "a")
    transport = httpx.ASGITransport(build_api(writer))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
        for path, body in (
            ("/v1/score", {"text_1": "a", "text_2": "b"}),
            ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ):
            assert "--task score" in error_of(await other.post(path, json=body), 400)["message"]


async def test_a_qwen_reranker_and_its_instruction(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3 yes or no")
    async with served(folder, task=PipelineTask.SCORE) as client:
        plain = await asked(client, "/rerank", query="q", documents=["a", "b"])
        told = await asked(client, "/rerank", query="q", documents=["a", "b"], instruction="Find the letter a")
        expected = await expected_of(folder, [("q", "a"), ("q", "b")])
        found = {one["index"]: one["relevance_score"] for one in plain["results"]}
        assert [found[0], found[1]] == pytest.approx(expected.tolist(), abs=1e-6)
        assert told["usage"] != plain["usage"]
        assert {one["relevance_score"] for one in told["results"]} != set(found.values())
