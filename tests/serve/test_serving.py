"""The whole path on a real Ray Serve: HTTP through HAProxy, replica, worker group, and back as a stream."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.util.state import list_actors, list_tasks

from max_ray.actors.messages import NAMESPACE, GroupStatus
from max_ray.errors import InputError
from max_ray.serve.api.openai import ChatCompletionRequest, CompletionRequest
from tests.actors.helpers import actors_of, eventually, kill, num_used_blocks, registry_status
from tests.serve.applications import deployed, worker_pids
from tests.serve.conftest import Served

pytestmark = [pytest.mark.ray]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


async def group_of(served: Served) -> GroupStatus:
    (group,) = [row for row in (await registry_status()).groups if row.app == served.app_name]
    return group


def member(group: GroupStatus, part: str) -> Any:
    (name,) = [name for name in actors_of(group.app) if f":{part}:" in name and group.group_id in name]
    return ray.get_actor(name, namespace=NAMESPACE)


async def complete(served: Served, prompt: str, max_tokens: int = 24) -> str:
    answer = await served.client().completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, **GREEDY)
    return answer.choices[0].text


async def stream(served: Served, prompt: str, max_tokens: int = 24) -> str:
    chunks = await served.client().completions.create(
        model="tiny", prompt=prompt, max_tokens=max_tokens, stream=True, **GREEDY
    )
    return "".join([chunk.choices[0].text async for chunk in chunks])


async def test_the_openai_client_gets_answers_and_streams(served: Served) -> None:
    client = served.client()
    assert [model.id for model in (await client.models.list()).data] == ["tiny"]
    whole = await client.completions.create(model="tiny", prompt="Hello", max_tokens=20, **GREEDY)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6, 20)
    assert await stream(served, "Hello", 20) == whole.choices[0].text
    messages: Any = [{"role": "user", "content": "Hi"}]
    chat = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, **GREEDY)
    chunks = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, stream=True, **GREEDY)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
    assert text == chat.choices[0].message.content


async def test_keys_are_asked_for(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models", headers=served.headers)).status_code == 200


async def test_streams_side_by_side_are_not_mixed(served: Served) -> None:
    prompts = [f"number {i}: {'x' * (i % 7)}" for i in range(32)]
    alone = {prompt: await complete(served, prompt) for prompt in prompts[:4]}
    texts = await asyncio.gather(*[stream(served, prompt) for prompt in prompts])
    assert {prompt: text for prompt, text in zip(prompts, texts, strict=True) if prompt in alone} == alone
    again = await asyncio.gather(*[stream(served, prompt) for prompt in prompts])
    assert again == texts


async def test_actor_calls_stay_far_below_one_a_token(served: Served) -> None:
    await complete(served, "warm")
    since = time.time() * 1000
    await asyncio.gather(*[stream(served, f"request {i}", 64) for i in range(64)])
    await asyncio.sleep(3)  # task events travel once a second
    tasks = list_tasks(filters=[("type", "=", "ACTOR_TASK")], limit=10_000, detail=True, raise_on_missing_output=False)
    ours = re.compile(r"(ModelWorker|KVManagerActor|RegistryActor)\.")
    calls = [task.name for task in tasks if ours.match(task.name or "") and (task.creation_time_ms or 0) >= since]
    assert calls, "the calls of this test must be among the recorded ones"
    assert len(calls) <= 0.05 * 64 * 64, f"{len(calls)} calls: { {name: calls.count(name) for name in set(calls)} }"


async def test_the_actors_of_an_application(served: Served) -> None:
    group = await group_of(served)
    assert group.state == "ready"
    parts = sorted(name.removeprefix(group.group_id + ":") for name in actors_of(served.app_name))
    assert parts == [f"kv_manager:{group.epoch}", f"worker_0:{group.epoch}"]


async def test_a_python_handle_takes_the_same_typed_request(served: Served) -> None:
    handle = serve.get_app_handle(served.app_name)
    request = CompletionRequest(model="tiny", prompt="Hello", max_tokens=10, temperature=0, ignore_eos=True)
    whole = await handle.answer.remote(request)
    assert whole["choices"][0]["text"] == await complete(served, "Hello", 10)
    streamed = request.model_copy(update={"stream": True})
    chunks = [chunk async for chunk in handle.generate.options(stream=True).remote(streamed)]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    (only,) = [item async for item in handle.generate.options(stream=True).remote(request)]
    assert only["choices"] == whole["choices"]
    wrong = ChatCompletionRequest(model="tini", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(InputError, match="Did you mean 'tiny'"):
        await handle.answer.remote(wrong)


async def test_hanging_up_frees_the_blocks(served: Served) -> None:
    group = await group_of(served)
    manager = member(group, "kv_manager")
    chunks = await served.client().completions.create(
        model="tiny", prompt="a long one", max_tokens=240, stream=True, **GREEDY
    )
    await anext(aiter(chunks))
    await chunks.close()
    await eventually(lambda: num_used_blocks(manager) == 0, 10, "every block is given back")


async def test_every_block_is_given_back_when_some_of_many_clients_hang_up(served: Served) -> None:
    group = await group_of(served)
    manager = member(group, "kv_manager")
    tasks = [asyncio.create_task(stream(served, f"traffic {i}", 20 + i % 90)) for i in range(24)]
    for task in tasks[::5]:
        await asyncio.sleep(0.05)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await eventually(lambda: num_used_blocks(manager) == 0, 10, "every block is given back")


async def test_metrics_name_the_replica(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, headers=served.headers, timeout=30) as client:
        before = (await client.get("/metrics")).text
        await complete(served, "count me", 7)
        after = (await client.get("/metrics")).text
    pattern = re.compile(r'^max_ray_generated_tokens_total\{model_name="tiny",replica="(\w+)"\} (\d+)', re.MULTILINE)
    (first,), (second,) = pattern.findall(before), pattern.findall(after)
    assert first[0] == second[0]
    assert int(second[1]) - int(first[1]) == 7


async def test_a_stream_survives_the_death_of_its_worker(served: Served) -> None:
    expected = await complete(served, "survive", 200)
    group = await group_of(served)
    chunks = await served.client().completions.create(
        model="tiny", prompt="survive", max_tokens=200, stream=True, **GREEDY
    )
    text = ""
    async for chunk in chunks:
        if not text:
            kill(member(group, "worker_0"))
        text += chunk.choices[0].text
    assert text == expected
    after = await group_of(served)
    assert after.group_id == group.group_id
    assert after.epoch > group.epoch
    async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
        assert (await client.get("/health")).status_code == 200


async def test_serve_listens_on_loopback_only(served: Served) -> None:
    """Also HAProxy's own ports. What is wide is Ray's gRPC, behind its token: one port a process, two a replica."""
    processes = psutil.Process().children(recursive=True)
    front = [process for process in processes if process.name() == "haproxy"]
    replicas = [process for process in processes if "ServeReplica" in " ".join(process.cmdline()[:1])]
    assert front
    assert replicas
    assert [ports for process in front if (ports := wide_ports(process))] == []
    for process in replicas:
        assert len(wide_ports(process)) <= 2
        assert not [port for port in wide_ports(process) if 30_000 <= port <= 31_000], "the replica's HTTP server"
    assert served.port in [c.laddr.port for process in front for c in process.net_connections("tcp")]


def wide_ports(process: psutil.Process) -> list[int]:
    listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return [c.laddr.port for c in listening if not c.laddr.ip.startswith(("127.", "::1", "::ffff:127."))]


def answers(served: Served) -> list[dict[str, Any]]:
    """Greedy, seeded and penalized completions, one by one and in one batch, with their log probabilities."""
    client = served.sync_client()
    prompts = ["Hello", "a longer prompt, over several pages of the cache", "x"]
    rows: list[dict[str, Any]] = []
    for temperature in (0.0, 1.0):
        for prompt in (*prompts, prompts):
            answer = client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=24,
                temperature=temperature,
                seed=11,
                top_p=0.95,
                frequency_penalty=0.5,
                logprobs=3,
                extra_body={"ignore_eos": True},
            )
            rows += [{"text": choice.text, "logprobs": choice.logprobs} for choice in answer.choices]
    return rows


def living(class_name: str, app: str = "") -> list[Any]:
    """From Ray's own actor list."""
    actors = list_actors(filters=[("state", "=", "ALIVE"), ("class_name", "=", class_name)], limit=1000)
    return [actor for actor in actors if (actor.name or "").startswith(app and f"{app}-")]


async def test_two_ranks_over_http_answer_as_one(served: Served, tiny_llama: Path) -> None:
    expected = answers(served)
    async with deployed(tiny_llama, served.port, "tp2", tensor_parallel_size=2) as two:
        found = answers(two)
        assert [row["text"] for row in found] == [row["text"] for row in expected]
        assert len({row["text"] for row in expected}) > 4, "different prompts and seeds must show"
        for mine, theirs in zip(found, expected, strict=True):
            assert mine["logprobs"].tokens == theirs["logprobs"].tokens
            assert mine["logprobs"].token_logprobs == pytest.approx(theirs["logprobs"].token_logprobs, abs=1e-4)
            for mine_top, their_top in zip(mine["logprobs"].top_logprobs, theirs["logprobs"].top_logprobs, strict=True):
                assert mine_top == pytest.approx(their_top, abs=1e-4)

        assert len(living("RegistryActor")) == 1
        for app, size in ((served.app_name, 1), ("tp2", 2)):
            assert len(living("KVManagerActor", app)) == 1
            assert len(living("ModelWorker", app)) == size
        pids = worker_pids("tp2")
        assert len({*pids, *worker_pids(served.app_name)}) == 3
        assert {actor.pid for actor in living("ModelWorker", "tp2")} == set(pids)
    await eventually(lambda: not actors_of("tp2"), 15, "the group ends with its application")
    assert len(living("ModelWorker", served.app_name)) == 1
