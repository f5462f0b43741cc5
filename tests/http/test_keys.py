"""API keys of a file: who is let in, to what, how much; and a file that changes while it is read."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from max_ray.cli.main import main
from max_ray.errors import ConfigError
from max_ray.serve.api.access.caller import Caller
from max_ray.serve.api.access.key_file import key_hash, new_key, read_key_file
from max_ray.serve.api.access.key_ring import KeyRing
from max_ray.serve.api.access.rate_limits import KeyLimits, KeyUsage
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.routes import build_api
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

BODY = {"prompt": "ab", "max_tokens": 3}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    """Entries with a `key` in clear, which becomes its hash."""
    keys = [{"name": e.get("name", e["key"]), "sha256": key_hash(e["key"].encode()), **e} for e in entries]
    for entry in keys:
        del entry["key"]
    fresh = path.with_suffix(".new")
    fresh.write_text(yaml.safe_dump({"keys": keys}))
    fresh.chmod(0o600)
    fresh.replace(path)
    return path


@asynccontextmanager
async def serving(engine: FakeEngine, path: Path | None, *keys: str) -> AsyncIterator[httpx.AsyncClient]:
    options = ApiOptions(api_keys=keys, api_keys_file=None if path is None else str(path))
    transport = httpx.ASGITransport(build_api(engine, options))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


async def post(client: httpx.AsyncClient, key: str, **fields: Any) -> httpx.Response:
    return await client.post("/v1/completions", json=BODY | fields, headers={"Authorization": f"Bearer {key}"})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_keys_of_a_file_and_of_the_environment(engine: FakeEngine, tmp_path: Path) -> None:
    path = write(tmp_path / "keys.yaml", {"key": "one"}, {"key": "two", "weight": 3})
    async with serving(engine, path, "of-environment") as client:
        for key in ("one", "two", "of-environment"):
            assert (await post(client, key)).status_code == 200
        for key in ("", "On", "one ", "ONE", key_hash(b"one"), "three"):
            expected = 200 if key == "one " else 401
            assert (await post(client, key)).status_code == expected
        assert (await client.get("/v1/models", headers={"x-api-key": "two"})).status_code == 200
        assert (await client.get("/health")).status_code == 200
    names = [context.tenant for context in engine.contexts]
    assert names == ["one", "two", f"key-{key_hash(b'of-environment')[:8]}", "one"]
    assert [context.tenant_weight for context in engine.contexts] == [1, 3, 1, 1]


async def test_models_of_a_key(engine: FakeEngine, tmp_path: Path) -> None:
    path = write(tmp_path / "k", {"key": "other", "models": ["x"]}, {"key": "this", "models": ["fake", "x"]})
    async with serving(engine, path) as client:
        assert (await post(client, "this", model="fake")).status_code == 200
        for fields in ({}, {"model": "fake"}):
            assert error_of(await post(client, "other", **fields), 403)["type"] == "permission_denied"
        header = {"x-api-key": "other"}
        assert (await client.get("/v1/models", headers=header)).json()["data"] == []
        assert (await client.get("/v1/models/fake", headers=header)).status_code == 403
        chat = {"model": "fake", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
        assert (await client.post("/v1/messages", json=chat, headers=header)).status_code == 403


async def test_requests_at_a_time(engine: FakeEngine, tmp_path: Path) -> None:
    path = write(tmp_path / "k", {"key": "one", "max_concurrent_requests": 2}, {"key": "two"})
    engine.gate = asyncio.Event()
    async with serving(engine, path) as client:
        first = [asyncio.create_task(post(client, "one")) for _ in range(2)]
        while len(engine.contexts) < 2:
            await asyncio.sleep(0.001)
        refused = await post(client, "one")
        assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "1"
        assert (await client.get("/v1/models", headers={"x-api-key": "one"})).status_code == 200
        other = asyncio.create_task(post(client, "two"))
        engine.gate.set()
        assert [(await task).status_code for task in (*first, other)] == [200] * 3
        assert (await post(client, "one")).status_code == 200


async def test_requests_and_tokens_a_minute(engine: FakeEngine, tmp_path: Path) -> None:
    path = write(tmp_path / "k", {"key": "r", "requests_per_minute": 3}, {"key": "t", "tokens_per_minute": 13})
    async with serving(engine, path) as client:
        assert [(await post(client, "r")).status_code for _ in range(5)] == [200] * 3 + [429] * 2
        answers = [await post(client, "t") for _ in range(4)]  # 5 or 6 tokens each
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 10 <= int(answers[-1].headers["retry-after"]) <= 30
        assert "13 tokens a minute" in error_of(answers[-1], 429)["message"]


def test_buckets_are_refilled() -> None:
    clock = Clock()
    usage = KeyUsage(KeyLimits(requests_per_minute=60, tokens_per_minute=600), clock)
    assert all(usage.refusal() is None for _ in range(60))
    limit, wait_s = usage.refusal() or ("", 0.0)
    assert (limit, wait_s) == ("60 requests a minute", pytest.approx(1.0))
    clock.now += 1.01
    assert usage.refusal() is None
    usage.add_tokens(1200)
    limit, wait_s = usage.refusal() or ("", 0.0)
    assert limit == "600 tokens a minute"
    clock.now += wait_s - 0.01
    assert usage.refusal() is not None
    clock.now += 0.02
    assert usage.refusal() is None
    clock.now += 3600
    assert sum(usage.refusal() is None for _ in range(100)) == 60, "a bucket holds one minute"


async def test_a_changed_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, path = Clock(), tmp_path / "keys.yaml"
    write(path, {"key": "one", "requests_per_minute": 2})
    ring = KeyRing((), path, clock)

    def find(key: str) -> Caller | None:
        return ring.find(key.encode())

    first = find("one")
    assert first is not None
    assert first.usage.refusal() is None
    write(path, {"key": "one", "requests_per_minute": 2, "weight": 5}, {"key": "two"})
    await ring.refresh()
    assert find("two") is None, "it is looked at once a second"
    clock.now += 1
    await ring.refresh()
    again = find("one")
    assert again is not None
    assert (again.weight, again.usage) == (5, first.usage), "what was used stays used"
    assert find("two") is not None
    for broken in ("keys: [", "keys: []", "other: 1", "keys:\n- name: x\n  sha256: aa\n"):
        path.write_text(broken)
        clock.now += 1
        await ring.refresh()
        assert find("two") is not None
    assert "The keys stay as they were" in caplog.text
    path.unlink()
    clock.now += 1
    await ring.refresh()
    assert find("two") is not None
    write(path, {"key": "two"})
    clock.now += 1
    await ring.refresh()
    assert find("two") is not None
    assert find("one") is None, "a key that was taken out"


def test_a_file_that_others_may_open_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "keys.yaml", {"key": "one"})
    KeyRing((), path)
    assert "0600" not in caplog.text
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        KeyRing((), path)
    assert "make its mode 0600" in caplog.text


HASH = key_hash(b"x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "wrong at"),
        ("- 1", "wrong at"),
        ("keys: []", "has no key"),
        ("keys: [{name: a}]", "wrong at keys.0.sha256"),
        (f"keys: [{{name: a b, sha256: {HASH}}}]", "wrong at keys.0.name"),
        (f"keys: [{{name: a, sha256: {HASH[1:]}}}]", "wrong at keys.0.sha256"),
        (f"keys: [{{name: a, sha256: {HASH}, weight: 0}}]", "wrong at keys.0.weight"),
        (f"keys: [{{name: a, sha256: {HASH}, tokens_per_minute: 0}}]", "wrong at keys.0.tokens_per_minute"),
        (f"keys: [{{name: a, sha256: {HASH}, requests_per_minute: 1.5}}]", "wrong at keys.0.requests_per_minute"),
        (f"keys: [{{name: a, sha256: {HASH}, admin: maybe}}]", "wrong at keys.0.admin"),
        (f"keys: [{{name: a, sha256: {HASH}, wieght: 2}}]", "wrong at keys.0.wieght"),
        (f"keys: [{{name: a, sha256: {HASH}}}, {{name: b, sha256: {HASH.upper()}}}]", "same sha256"),
        (f"keys: [{{name: a, sha256: {HASH}}}, {{name: a, sha256: {key_hash(b'y')}}}]", "same name"),
        ("keys: [", "neither YAML nor JSON"),
        ("\x00", "neither YAML nor JSON"),
        ("!!python/object:os.system {}", "neither YAML nor JSON"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_key_file(path)
    assert HASH not in str(caught.value)


def test_a_file_may_be_json_and_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": "a", "sha256": HASH, "admin": True, "models": ["m"]}]}))
    (entry,) = read_key_file(path)
    assert (entry.admin, entry.models, entry.weight) == (True, ("m",), 1.0)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_key_file(tmp_path / "none")


def test_the_command_makes_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "alice", "--weight", "2", "--tokens-per-minute", "1000", "--admin"]) == 0
    printed = capsys.readouterr().out
    (key,) = re.findall(r"^mr-\S{43}$", printed, re.MULTILINE)
    path = tmp_path / "keys.yaml"
    path.write_text("keys:\n" + printed[printed.index("- name") :])
    (entry,) = read_key_file(path)
    assert (entry.name, entry.weight, entry.tokens_per_minute, entry.admin) == ("alice", 2, 1000, True)
    caller = KeyRing((), path).find(key.encode())
    assert caller is not None
    assert caller.is_admin
    assert key not in path.read_text()
    assert len({new_key() for _ in range(100)}) == 100
    for wrong in (["a b"], ["a", "--weight", "-1"], ["a", "--requests-per-minute", "0"]):
        assert main(["keys", "new", *wrong]) == 2


async def test_a_preflight_is_answered_without_a_key(engine: FakeEngine) -> None:
    api = build_api(engine, ApiOptions(api_keys=("key",), allowed_origins=("https://chat.example.org",)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://127.0.0.1") as client:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        reply = await client.options("/v1/completions", headers={"Origin": "https://chat.example.org", **asks})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://chat.example.org"
        assert "authorization" in reply.headers["access-control-allow-headers"].lower()
        foreign = await client.options("/v1/completions", headers={"Origin": "https://evil.example", **asks})
        assert foreign.status_code == 403


async def test_the_deadline_reaches_the_scheduler(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json=BODY, headers={"x-request-timeout-seconds": "5"})
    await client.post("/v1/completions", json=BODY)
    first, second = engine.contexts
    assert first.deadline is not None
    assert second.deadline is None
