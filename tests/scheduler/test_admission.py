"""The choices of one request come in together or not at all, and what can never come in is told so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from max_ray.errors import InputError, QueueFullError
from max_ray.interfaces import RequestID, TextContext, TextGenerationOutput
from max_ray.scheduler import GenerationLoop
from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of
from tests.scheduler.fakes import make_context
from tests.scheduler.harness import running


class LoopEngine(FakeEngine):
    """The fake engine with a real loop behind it."""

    def __init__(self, tokenizer: TextTokenizer, loop: GenerationLoop) -> None:
        super().__init__(tokenizer, lambda context: "")
        self.loop = loop

    def submit(self, context: TextContext) -> AsyncIterator[TextGenerationOutput]:
        return self.loop.submit(context)

    def cancel(self, request_id: RequestID) -> None:
        self.loop.cancel(request_id)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("admission")), max_length=60)


async def ask(engine: LoopEngine, **fields: Any) -> httpx.Response:
    transport = httpx.ASGITransport(build_api(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.post("/v1/completions", json={"prompt": [7], "max_tokens": 2, "ignore_eos": True, **fields})


@pytest.mark.parametrize(("fields", "num_choices"), [({"n": 12}, 12), ({"prompt": [[7], [8]], "n": 6}, 12), ({}, 1)])
async def test_an_idle_server_takes_as_many_as_it_runs_and_lets_wait(
    tokenizer: TextTokenizer, fields: dict[str, Any], num_choices: int
) -> None:
    async with running(max_batch_size=8, max_queued=4) as harness:
        reply = await ask(LoopEngine(tokenizer, harness.loop), **fields)
        assert reply.status_code == 200, reply.text
        assert len(reply.json()["choices"]) == num_choices


@pytest.mark.parametrize(
    ("fields", "param", "num_choices"),
    [({"n": 16}, "n", 16), ({"n": 13}, "n", 13), ({"prompt": [[7]] * 20}, "prompt", 20)],
)
async def test_what_can_never_come_in_is_a_400_with_the_number(
    tokenizer: TextTokenizer, fields: dict[str, Any], param: str, num_choices: int
) -> None:
    async with running(max_batch_size=8, max_queued=4) as harness:
        reply = await ask(LoopEngine(tokenizer, harness.loop), **fields)
        error = error_of(reply, 400)
        assert (error["param"], "retry-after" in reply.headers) == (param, False)
        assert f"{num_choices} choices" in error["message"]
        assert "12 at most" in error["message"]
        assert harness.loop.stats.rejected == 0
        assert (harness.loop.stats.queued, harness.loop.stats.running) == (0, 0)


async def test_siblings_are_not_waiting_already(tokenizer: TextTokenizer) -> None:
    """Without a queue, a batch's worth of choices comes in; while one row runs, it is told to come again."""
    async with running(max_batch_size=4, max_queued=0) as harness:
        engine = LoopEngine(tokenizer, harness.loop)
        assert (await ask(engine, n=4)).status_code == 200
        stream = harness.loop.submit(make_context("long", [1], 50))
        await harness.at_step(3)
        reply = await ask(engine, n=4)
        assert error_of(reply, 429)["type"] == "queue_full"
        assert harness.loop.stats.queued == 0
        assert (await ask(engine, n=3)).status_code == 200
        assert [output async for output in stream][-1].is_done


async def test_the_first_of_several_is_refused_for_all() -> None:
    async with running(max_batch_size=2, max_queued=1) as harness:
        busy = harness.loop.submit(make_context("busy", [1], 20))
        await harness.at_step(2)
        context = make_context("first", [2])
        context.num_siblings = 2
        with pytest.raises(QueueFullError, match="are waiting already"):
            harness.loop.submit(context)
        context.num_siblings = 3
        with pytest.raises(InputError, match=r"4 choices at once.* 3 at most"):
            harness.loop.submit(context)
        assert [output async for output in busy][-1].is_done
