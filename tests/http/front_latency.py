"""Measures what the front adds to the first token: `python -m tests.http.front_latency [ROUNDS]`.

Three processes: a model's server with a fake engine, the front, and this client. Each round asks one after the other,
in turns that change, on a kept connection, for a streamed chat.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time

import aiohttp
import uvicorn

from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.front.forwarder import Forwarder
from max_ray.serve.api.front.replica_table import ReplicaTable
from max_ray.serve.api.front.routes import FrontApp
from max_ray.serve.api.front.served_model import ModelTable, ServedModel
from max_ray.serve.api.front.state import FrontState
from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.http.fake_engine import FakeEngine

BODY = {"messages": [{"role": "user", "content": "Hello " * 20}], "max_tokens": 16, "stream": True, "model": "fake"}
WARM_UP = 30


def serve_model() -> None:
    """The model's own server."""
    with tempfile.TemporaryDirectory() as folder:
        engine = FakeEngine(
            TextTokenizer(write_byte_level(Path(folder)), max_length=400), lambda context: "hello there"
        )
        run(build_api(engine))


def serve_front(url: str) -> None:
    """The front of two models, of which one is at `url`."""

    async def wake(model: str) -> str:
        raise AssertionError(model)

    models = ModelTable([ServedModel("fake", max_length=400), ServedModel("other")])
    replicas = ReplicaTable(wake)
    replicas.update("fake", {url: True})
    state = FrontState(models, replicas)
    run(FrontApp(state, Forwarder(models, replicas, ApiOptions())))


def run(app: object) -> None:
    """Serves on a free port, which is printed."""

    class Told(uvicorn.Server):
        async def startup(self, sockets: object = None) -> None:
            await super().startup()
            print(self.servers[0].sockets[0].getsockname()[1], flush=True)

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", access_log=False)  # type: ignore[arg-type]
    Told(config).run()


@contextmanager
def process(*arguments: str) -> Iterator[str]:
    """The URL of one of the two, in a process of its own."""
    command = [sys.executable, "-m", "tests.http.front_latency", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield f"http://127.0.0.1:{int(child.stdout.readline())}"
    finally:
        child.terminate()
        child.wait(10)


async def first_token_ms(session: aiohttp.ClientSession, url: str) -> float:
    """From the request to the first event with a token."""
    begin = perf_counter()
    async with session.post(f"{url}/v1/chat/completions", data=json.dumps(BODY), headers=JSON) as reply:
        assert reply.status == 200
        seen = b""
        while b'"content":"h' not in seen.replace(b": ", b":"):
            seen += await reply.content.readany()
        elapsed = perf_counter() - begin
        await reply.read()
    return elapsed * 1000


JSON = {"Content-Type": "application/json"}


async def measure(direct: str, front: str, rounds: int) -> None:
    """Prints both medians and what lies between."""
    times: dict[str, list[float]] = {direct: [], front: []}
    async with aiohttp.ClientSession() as session:
        for number in range(rounds + WARM_UP):
            for url in (direct, front) if number % 2 else (front, direct):
                took = await first_token_ms(session, url)
                if number >= WARM_UP:
                    times[url].append(took)
    before, behind = (statistics.median(times[url]) for url in (direct, front))
    print(f"first token, p50 of {rounds} by turns: direct {before:.2f} ms, through the front {behind:.2f} ms")
    print(f"added: {behind - before:.2f} ms, {(behind / before - 1) * 100:.0f} %; client's CPU {process_time():.1f} s")


def main() -> None:
    """One of the three processes."""
    if sys.argv[1:2] == ["model"]:
        serve_model()
    elif sys.argv[1:2] == ["front"]:
        serve_front(sys.argv[2])
    else:
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
        with process("model") as direct, process("front", direct) as front:
            asyncio.run(measure(direct, front, rounds))


if __name__ == "__main__":
    main()
