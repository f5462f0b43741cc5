"""Resumable streams over a fake engine: cut at every place and read on, here and at a second replica."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import httpx
import openai
import pytest

from max_ray.errors import InputError, MaxRayError, ServerStoppingError, StaleLeaseError, WorkerGroupError
from max_ray.interfaces import TextContext, TextGenerationOutput
from max_ray.serve.api import answer
from max_ray.serve.api.access.caller import CALLER, Caller
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.openai import ChatCompletionRequest, CompletionRequest, parse_request
from max_ray.serve.api.routes import build_api
from max_ray.serve.api.streams import event_log, stream_table
from max_ray.serve.api.streams.cursor import event_id, parse_cursor
from max_ray.serve.api.streams.event_log import EventLog
from max_ray.serve.api.streams.journal import LocalStreamJournal
from max_ray.serve.api.streams.stream_table import StreamTable
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.http.fake_engine import FakeEngine
from tests.source_tree import ROOT

TEXT = "aé€😀 stop<b>c"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL = 'x<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
RESUMABLE: dict[str, Any] = {"stream": True, "stream_options": {"resumable": True}}
WITH_USAGE = RESUMABLE | {"stream_options": {"resumable": True, "include_usage": True}}
CONTINUOUS = {"stream_options": {"resumable": True, "include_usage": True, "continuous_usage_stats": True}}
COMPLETION = {"prompt": "p", "max_tokens": 40, "request_id": "r"} | RESUMABLE
CHAT = {"messages": [{"role": "user", "content": "p"}], "request_id": "r"} | RESUMABLE
BODIES: dict[str, dict[str, Any]] = {
    "text": COMPLETION,
    "usage": COMPLETION | WITH_USAGE,
    "usage in every chunk": COMPLETION | CONTINUOUS,
    "length": COMPLETION | {"max_tokens": 5},
    "stop string": COMPLETION | {"stop": ["top<"]} | WITH_USAGE,
    "log probabilities": COMPLETION | {"logprobs": 2, "stop": ["<b>"]},
    "echo": COMPLETION | {"logprobs": 1, "echo": True},
    "echo without": COMPLETION | {"echo": True},
    "two choices": COMPLETION | {"n": 2, "logprobs": 0} | WITH_USAGE,
    "two prompts": COMPLETION | {"prompt": ["p", "q"], "max_tokens": 4, "seed": 5},
    "token ids": COMPLETION | {"return_token_ids": True},
    "chat": CHAT,
    "chat of two": CHAT | {"n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 9} | WITH_USAGE,
    "chat with a tool": CHAT | {"tools": TOOLS},
}


class Stopping(FakeEngine):
    """allowed: tokens of each choice that come before it hangs. None: all."""

    allowed: int | None = None

    async def _steps(self, context: TextContext, ids: list[int]) -> AsyncIterator[TextGenerationOutput]:
        async for output in super()._steps(context, ids):
            if self.allowed is not None and context.tokens.generated_length > self.allowed:
                await asyncio.Event().wait()
            yield output


class Replicas:
    """Two replicas and their journal, which has a clock of its own."""

    def __init__(self, tokenizer: TextTokenizer, text: str = TEXT, grace_s: float = 15.0) -> None:
        self.now = 0.0
        self.apis: dict[int, Any] = {}
        self.journal = LocalStreamJournal(clock=lambda: self.now)
        self.engines = [Stopping(tokenizer, lambda context: text) for _ in range(2)]
        self.tables = [
            StreamTable(engine, self.journal, f"r{number}", grace_s) for number, engine in enumerate(self.engines)
        ]

    def client(self, number: int) -> httpx.AsyncClient:
        api = self.apis.get(number)
        if api is None:
            api = self.apis[number] = build_api(self.engines[number], streams=self.tables[number])
        return httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test")

    async def read_on(self, number: int, last_id: str, **headers: str) -> httpx.Response:
        async with self.client(number) as client:
            found: httpx.Response = await client.get(f"/v1/streams/{STREAM}?from={last_id}", headers=headers)
        return found

    async def close(self) -> None:
        for table in self.tables:
            await table.close()


STREAM = "cmpl-r"


def typed(body: dict[str, Any]) -> CompletionRequest | ChatCompletionRequest:
    return parse_request(CompletionRequest if "prompt" in body else ChatCompletionRequest, json.dumps(body).encode())


def events_of(piece: str) -> list[tuple[str, str]]:
    """(id, data) of each block. Times and random ids of calls are left out."""
    piece = re.sub(r'"created": \d+', '"created": 0', re.sub(r"call_[0-9a-f]{24}", "call_", piece))
    return [
        (match[1], match[2])
        for match in (re.fullmatch(r"id: (.*)\ndata: (.*)", b) for b in piece.split("\n\n"))
        if match
    ]


async def what_comes(replicas: Replicas, body: dict[str, Any]) -> list[tuple[str, str]]:
    """The events of the first replica until it ends or hangs."""
    reader = await replicas.tables[0].open(typed(body), 0.0, has_deadline=False)
    got: list[tuple[str, str]] = []
    events = reader.events()
    while True:
        try:
            async with asyncio.timeout(0.02):
                got += events_of((await anext(events)).decode())
        except (StopAsyncIteration, TimeoutError):
            break
    reader.close()
    return got


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("tokens_per_output", [1, 3])
async def test_a_stream_goes_on_elsewhere_at_every_cut(
    tokenizer: TextTokenizer, name: str, tokens_per_output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first replica dies after some tokens, of which the client has a part."""
    monkeypatch.setattr(stream_table, "FLUSH_EVERY_S", 0.001)
    monkeypatch.setattr(f"{__name__}.STREAM", "chatcmpl-r" if name.startswith("chat") else "cmpl-r")
    monkeypatch.setattr(tokenizer, "max_length", 1000)
    text = CALL if "tool" in name else TEXT
    undisturbed = await what_comes(Replicas(tokenizer, text), BODIES[name])
    assert undisturbed[-1][1] == "[DONE]"
    num_tokens = len(text.encode()) + 1
    for allowed in sorted({0, 1, 3, 8, num_tokens - 1, num_tokens}):
        await _cut_everywhere(Replicas(tokenizer, text), BODIES[name], allowed, tokens_per_output, undisturbed)


async def _cut_everywhere(
    replicas: Replicas, body: dict[str, Any], allowed: int, tokens_per_output: int, undisturbed: list[tuple[str, str]]
) -> None:
    replicas.engines[0].allowed = allowed
    replicas.engines[0].tokens_per_output = tokens_per_output
    first = await what_comes(replicas, body)
    await asyncio.sleep(0.01)
    await replicas.tables[0].close()
    for cut in range(len(first) + 1):
        replicas.now += 10
        last_id = first[cut - 1][0] if cut else "0"
        rest = await replicas.read_on(1, last_id)
        assert rest.status_code == 200, rest.text
        assert_same(first[:cut] + events_of(rest.text), undisturbed)
    await replicas.close()


def assert_same(events: list[tuple[str, str]], undisturbed: list[tuple[str, str]]) -> None:
    """Every event once; those of each choice in order. With several choices their order among each other may differ."""
    assert [data for _, data in events if data == "[DONE]"] == ["[DONE]"]
    assert [one_choice(events, index) for index in range(2)] == [one_choice(undisturbed, index) for index in range(2)]
    if "-" not in undisturbed[0][0]:
        assert events == undisturbed
    assert events[-1] == undisturbed[-1]


def one_choice(events: list[tuple[str, str]], index: int) -> list[str]:
    return [data for _, data in events if f'"index": {index}' in data]


@pytest.mark.parametrize("written", [True, False])
async def test_tokens_that_were_not_written_down_are_made_again(
    tokenizer: TextTokenizer, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_table, "FLUSH_EVERY_S", 0.001 if written else 60.0)
    replicas = Replicas(tokenizer)
    replicas.engines[0].allowed = 6
    first = await what_comes(replicas, COMPLETION)
    await asyncio.sleep(0.02)
    await replicas.tables[0].close()
    replicas.now += 10
    rest = events_of((await replicas.read_on(1, first[-1][0])).text)
    (context,) = replicas.engines[1].contexts
    assert first + rest == await what_comes(Replicas(tokenizer), COMPLETION)
    assert context.sampling_params.seed == replicas.engines[0].contexts[0].sampling_params.seed
    assert replicas.engines[1].metrics.generated_tokens == len(TEXT.encode()) + 1 - (6 if written else 0)
    await replicas.close()


async def test_a_living_replica_hands_its_last_tokens_over(tokenizer: TextTokenizer) -> None:
    replicas = Replicas(tokenizer)
    replicas.engines[0].allowed = 6
    reader = await replicas.tables[0].open(typed(COMPLETION), 0.0, has_deadline=False)
    events = reader.events()
    first = events_of((await anext(events)).decode())
    rest = events_of((await replicas.read_on(1, first[-1][0])).text)
    assert first + rest == await what_comes(Replicas(tokenizer), COMPLETION)
    assert replicas.engines[0].cancelled == [replicas.engines[0].contexts[0].request_id]
    with pytest.raises(WorkerGroupError, match="resumed at another replica"):
        [piece async for piece in events]
    again = events_of((await replicas.read_on(0, "3")).text)
    assert again == (first + rest)[3:]
    await replicas.close()


async def test_a_complete_stream_is_read_anywhere_without_the_engine(tokenizer: TextTokenizer) -> None:
    replicas = Replicas(tokenizer)
    whole = await what_comes(replicas, BODIES["stop string"])
    await asyncio.sleep(0.3)
    for number in (0, 1):
        assert events_of((await replicas.read_on(number, "2")).text) == whole[2:]
        header = await replicas.read_on(number, "2", **{"Last-Event-ID": "4"})
        assert events_of(header.text) == whole[4:]
        assert (await replicas.read_on(number, str(len(whole)))).text == ""
    assert not replicas.engines[1].contexts
    await replicas.close()


@pytest.mark.parametrize("kind", [WorkerGroupError, ServerStoppingError, StaleLeaseError])
async def test_a_replica_that_stops_leaves_its_streams_to_others(
    tokenizer: TextTokenizer, kind: type[MaxRayError]
) -> None:
    replicas = Replicas(tokenizer)
    replicas.engines[0].fail_after, replicas.engines[0].failure = 5, kind("gone")
    async with replicas.client(0) as client:
        first = (await client.post("/v1/completions", json=COMPLETION)).text
    *_, last = first.strip().split("\n\n")
    assert last.startswith("data: ")
    assert json.loads(last[6:])["error"]
    got = events_of(first)
    rest = events_of((await replicas.read_on(1, got[-1][0])).text)
    assert got + rest == await what_comes(Replicas(tokenizer), COMPLETION)
    await replicas.close()


async def test_an_error_of_the_request_ends_it_for_good(tokenizer: TextTokenizer) -> None:
    replicas = Replicas(tokenizer)
    replicas.engines[0].fail_after, replicas.engines[0].failure = 2, InputError("a grammar that fails")
    async with replicas.client(0) as client:
        assert "a grammar that fails" in (await client.post("/v1/completions", json=COMPLETION)).text
        await asyncio.sleep(0.3)
        assert (await client.get(f"/v1/streams/{STREAM}")).status_code == 404
    assert replicas.journal.num_bytes == 0


async def test_without_a_reader_it_goes_on_for_the_grace_only(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_table, "FLUSH_EVERY_S", 0.01)
    monkeypatch.setattr(stream_table, "HEARTBEAT_EVERY_S", 0.02)
    replicas = Replicas(tokenizer, grace_s=0.3)
    engine = replicas.engines[0]
    engine.allowed = 4
    first = await what_comes(replicas, COMPLETION)
    await asyncio.sleep(0.15)
    assert not engine.cancelled
    assert events_of(await _first_piece(replicas, 0, "1"))[0] == first[1]
    await asyncio.sleep(0.15)
    assert not engine.cancelled  # it was read in between
    await asyncio.sleep(0.3)
    assert engine.cancelled == [engine.contexts[0].request_id]
    assert replicas.journal.num_bytes == 0
    for number in (0, 1):
        assert (await replicas.read_on(number, "1")).status_code == 404


async def _first_piece(replicas: Replicas, number: int, last_id: str) -> str:
    reader = await replicas.tables[number].resume(STREAM, last_id)
    piece = (await anext(reader.events())).decode()
    reader.close()
    return piece


async def test_of_two_that_bring_a_stream_one_goes_on_for_both(tokenizer: TextTokenizer) -> None:
    replicas = Replicas(tokenizer)
    replicas.engines[0].allowed = 5
    await what_comes(replicas, COMPLETION)
    await replicas.tables[0].close()
    replicas.now += 10
    answers = await asyncio.gather(*[replicas.read_on(1, str(number)) for number in range(4)])
    assert len({len(events_of(answer.text)) for answer in answers}) == 4
    assert len(replicas.engines[1].contexts) == 1
    await replicas.close()


async def test_a_full_queue_leaves_the_stream_in_the_journal(tokenizer: TextTokenizer) -> None:
    replicas = Replicas(tokenizer)
    replicas.engines[0].allowed = 5
    first = await what_comes(replicas, COMPLETION)
    await asyncio.sleep(0.15)
    await replicas.tables[0].close()
    replicas.now += 10
    replicas.engines[1].refuse = WorkerGroupError("not now")
    assert (await replicas.read_on(1, first[-1][0])).status_code == 503
    replicas.engines[1].refuse = None
    rest = events_of((await replicas.read_on(1, first[-1][0])).text)
    assert first + rest == await what_comes(Replicas(tokenizer), COMPLETION)
    await replicas.close()


async def test_other_keys_find_nothing(tokenizer: TextTokenizer) -> None:
    replicas = Replicas(tokenizer)
    replicas.engines[0].allowed = 3
    token = CALLER.set(Caller(name="first"))
    await what_comes(replicas, COMPLETION)
    CALLER.reset(token)
    async with replicas.client(0) as here, replicas.client(1) as elsewhere:
        for client in (here, elsewhere):
            for method in ("GET", "DELETE"):
                refused = await client.request(method, f"/v1/streams/{STREAM}")
                assert refused.status_code == 404
                assert refused.json()["error"]["param"] == "stream_id"
    assert not replicas.engines[0].cancelled
    token = CALLER.set(Caller(name="admin", is_admin=True))
    assert await _first_piece(replicas, 0, "0")
    CALLER.reset(token)
    await replicas.close()


async def test_a_stream_is_ended_by_a_request(tokenizer: TextTokenizer) -> None:
    for number in (0, 1):
        replicas = Replicas(tokenizer)
        replicas.engines[0].allowed = 3
        await what_comes(replicas, COMPLETION)
        async with replicas.client(number) as client:
            assert (await client.delete(f"/v1/streams/{STREAM}")).json()["deleted"] is True
            await asyncio.sleep(0.3)
            assert (await client.delete(f"/v1/streams/{STREAM}")).status_code == 404
        assert replicas.engines[0].cancelled
        assert replicas.journal.num_bytes == 0
        await replicas.close()


@pytest.mark.parametrize("last_id", ["x", "-1", "1-2", "1.5", "9" * 40])
async def test_bad_ids(tokenizer: TextTokenizer, last_id: str) -> None:
    replicas = Replicas(tokenizer)
    await what_comes(replicas, COMPLETION)
    refused = await replicas.read_on(0, last_id)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "from")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"stream": False}, "stream_options.resumable"),
        ({"t_max_predict_ms": 1000}, "stream_options.resumable"),
        ({"timeout": 5}, "stream_options.resumable"),
        ({"prompt": "p" * 5000}, "prompt"),
        ({"logprobs": 50}, "logprobs"),
    ],
)
async def test_what_is_refused(tokenizer: TextTokenizer, changes: dict[str, Any], param: str) -> None:
    replicas = Replicas(tokenizer)
    async with replicas.client(0) as client:
        refused = await client.post("/v1/completions", json=COMPLETION | changes)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert replicas.journal.num_bytes == 0


async def test_it_can_be_switched_off_and_handles_have_none(tokenizer: TextTokenizer) -> None:
    engine = FakeEngine(tokenizer, lambda context: TEXT)
    api = build_api(engine, ApiOptions(resume_grace_s=0))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
        refused = await client.post("/v1/completions", json=COMPLETION)
        assert "resume_grace_s is 0" in refused.json()["error"]["message"]
    with pytest.raises(InputError, match="handle"):
        await anext(aiter(answer.generate(engine, typed(COMPLETION))))


async def test_a_full_journal_and_an_id_in_use(tokenizer: TextTokenizer) -> None:
    replicas = Replicas(tokenizer)
    replicas.engines[0].allowed = 1
    await what_comes(replicas, COMPLETION)
    async with replicas.client(1) as client:
        refused = await client.post("/v1/completions", json=COMPLETION)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "request_id")
        replicas.journal._max_bytes = replicas.journal.num_bytes + 100
        refused = await client.post("/v1/completions", json=COMPLETION | {"request_id": "other"})
        assert refused.status_code == 429
        assert "retry-after" in refused.headers
        replicas.journal._max_bytes = 10
        refused = await client.post("/v1/completions", json=COMPLETION | {"request_id": "other"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream_options.resumable")
    await replicas.close()


async def test_a_new_journal_learns_all_again(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_table, "FLUSH_EVERY_S", 0.01)
    monkeypatch.setattr(stream_table, "HEARTBEAT_EVERY_S", 0.02)
    replicas = Replicas(tokenizer)
    replicas.engines[0].allowed = 5
    first = await what_comes(replicas, COMPLETION)
    await asyncio.sleep(0.05)
    replicas.journal._entries.clear()
    replicas.journal._num_bytes = 0
    await asyncio.sleep(0.15)
    await replicas.tables[0].close()
    replicas.now += 10
    rest = events_of((await replicas.read_on(1, first[-1][0])).text)
    assert first + rest == await what_comes(Replicas(tokenizer), COMPLETION)
    assert replicas.engines[1].metrics.generated_tokens == len(TEXT.encode()) + 1 - 5
    await replicas.close()


async def test_the_journal_forgets_streams_of_silent_replicas(tokenizer: TextTokenizer) -> None:
    replicas = Replicas(tokenizer)
    replicas.engines[0].allowed = 1
    await what_comes(replicas, COMPLETION)
    await replicas.tables[0].close()
    replicas.now += 110
    assert await replicas.journal.owner_of(STREAM) == ""
    replicas.now += 11
    assert await replicas.journal.owner_of(STREAM) is None
    assert replicas.journal.num_bytes == 0


async def test_over_a_socket_with_a_hang_up_and_the_openai_client(server_url: str, engine: FakeEngine) -> None:
    """Ids stand in the blocks of their data, so clients that know nothing of them read such a stream."""
    engine.script = lambda context: TEXT
    engine.gate = asyncio.Event()
    async with httpx.AsyncClient(base_url=server_url) as client:
        async with client.stream("POST", "/v1/completions", json=COMPLETION) as response:
            piece = await anext(response.aiter_text())
        first = events_of(piece)
        assert [number for number, _ in first] == ["1"]
        engine.gate.set()
        rest = events_of((await client.get(f"/v1/streams/{STREAM}", params={"from": "1"})).text)
        assert rest[-1][1] == "[DONE]"
        whole = events_of((await client.get(f"/v1/streams/{STREAM}")).text)
    assert first + rest == whole
    assert not engine.cancelled
    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="x", max_retries=0) as sdk:
        chunks = await sdk.completions.create(
            model="fake", prompt="p", max_tokens=40, stream=True, extra_body={"stream_options": {"resumable": True}}
        )
        assert "".join([chunk.choices[0].text async for chunk in chunks]) == TEXT


async def test_a_stream_that_did_not_ask_ends_with_its_connection(server_url: str, engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    async with httpx.AsyncClient(base_url=server_url) as client:
        body = {"prompt": "p", "max_tokens": 40, "stream": True, "request_id": "r"}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert "id: " not in await anext(response.aiter_text())
        await asyncio.sleep(0.1)
        assert engine.cancelled
        assert (await client.get(f"/v1/streams/{STREAM}")).status_code == 404


def test_ids() -> None:
    for counts in ([0], [12], [3, 0, 41]):
        assert parse_cursor(event_id(counts), len(counts)) == counts
    assert parse_cursor(None, 2) == parse_cursor("0", 2) == [0, 0]


async def test_the_example_of_the_manual(server_url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream breaks after every five tokens."""
    section = (ROOT / "deployments" / "README.md").read_text().partition("### Resumable streams")[2]
    names: dict[str, Any] = {}
    exec(section.partition("```python")[2].partition("```")[0], names)
    monkeypatch.setattr(stream_table, "FLUSH_EVERY_S", 0.01)
    engine.script = lambda context: TEXT
    engine.fail_after, engine.failure = 5, WorkerGroupError("gone")
    body = {"messages": [{"role": "user", "content": "p"}], "max_tokens": 40}
    found = await asyncio.to_thread(lambda: list(names["chunks"](body, server_url)))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found) == TEXT
    assert len(engine.contexts) == 1 + len(TEXT.encode()) // 5


@pytest.mark.parametrize("packed_bytes", [1, 40, 300, 10**9])
async def test_old_events_are_packed(packed_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "PACKED_BYTES", packed_bytes)
    random = Random(packed_bytes)
    log = EventLog(2)
    events: list[tuple[int, bytes]] = []
    readings: list[tuple[list[int], list[bytes], asyncio.Task[None]]] = []

    async def follow(cursor: list[int], got: list[bytes]) -> None:
        got.extend([piece async for piece in log.read(cursor)])

    for number in range(200):
        choice = random.randrange(2)
        events.append((choice, b'data: {"choice": %d, "number": %d}\n\n' % (choice, number)))
        log.append(*events[-1])
        if number % 10 == 0:
            cursor, got = [random.randrange(60), random.randrange(60)], list[bytes]()
            readings.append((cursor, got, asyncio.create_task(follow(cursor, got))))
        await asyncio.sleep(0)
    log.end()
    for cursor, got, task in readings:
        await task
        found = re.findall(rb"^id: (.*)\n(data: .*\n\n)", b"".join(got), re.MULTILINE)
        for choice in range(2):
            of_choice = [event for number, event in events if number == choice][cursor[choice] :]
            assert [event for _, event in found if b'"choice": %d' % choice in event] == of_choice
        assert found[-1][0].decode() == event_id([sum(number == choice for number, _ in events) for choice in range(2)])


async def test_a_long_stream_takes_little_memory(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "max_length", 10_000)
    engine = FakeEngine(tokenizer, lambda context: "some words of no great interest, " * 250)
    table = StreamTable(engine, LocalStreamJournal(), "r", 15.0)
    reader = await table.open(typed(COMPLETION | {"max_tokens": 9000}), 0.0, has_deadline=False)
    sent = sum([len(piece) async for piece in reader.events()])
    (stream,) = table._streams.values()
    assert sent > 1_500_000
    assert stream.events.num_bytes < sent / 8
    await table.close()
