"""The drill: load, faults by schedule, verdict."""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import suppress
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from max_ray import settings
from max_ray.benchmark.client import Client, normal_url
from max_ray.chaos.faults import Injected, inject, schedule
from max_ray.chaos.processes import KINDS, ServerProcesses
from max_ray.chaos.streams import Load
from max_ray.chaos.verdict import Verdict, judge, table
from max_ray.errors import ConfigError, ServerFailedError
from max_ray.planning.memory_plan import aligned

_PROBE = {"prompt": "x", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
_BLOCKS_BACK_WITHIN_S = 15.0
_BLOCKS = re.compile(r"^max_ray_kv_blocks_used\{[^}]*\} (\S+)$", re.MULTILINE)


def run_drill(options: dict[str, Any]) -> None:
    """Runs the drill and prints its table. Raises ConfigError for wrong flags, ServerFailedError on a loss."""
    kinds = [kind.strip() for kind in (options["kinds"] or ",".join(KINDS)).split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigError(f"--kinds takes {', '.join(KINDS)}, not {options['kinds']!r}.")
    asyncio.run(_drill(options, kinds))


async def _drill(options: dict[str, Any], kinds: list[str]) -> None:
    url = normal_url(options["base_url"])
    key = settings.variable(options["api_key_env"]) if options["api_key_env"] else None
    processes = ServerProcesses.find(urlsplit(url).port or 80)
    before = {kind: len(processes.of_kind(kind)) for kind in KINDS}
    async with Client(url, api_key=key, timeout_s=300) as client:
        model = await client.first_model()
        load = Load(client, model, options["streams"], options["max_tokens"])
        await load.learn()
        running = asyncio.create_task(load.run())
        try:
            faults = await _inject_all(options, kinds, processes, client, model)
        finally:
            load.stop()
            with suppress(asyncio.CancelledError):
                await running
    verdict = judge(load.streams, faults)
    print(aligned(table(load.streams, faults)))
    problems = _problems(verdict) + await _leftovers(url, key, processes, before)
    print(
        f"{len(faults)} faults; streams: {len(verdict.whole)} whole, {len(verdict.cut)} cut or refused while their "
        f"connection's process was away, {len(verdict.lost)} lost, {len(verdict.different)} different"
    )
    if problems:
        raise ServerFailedError(" ".join(problems))


async def _inject_all(
    options: dict[str, Any], kinds: list[str], processes: ServerProcesses, client: Client, model: str
) -> list[Injected]:
    async def answers() -> bool:
        return (await client.post("completions", {"model": model, **_PROBE}, perf_counter())).failure is None

    faults: list[Injected] = []
    deadline = perf_counter() + options["duration"]
    for number, fault in enumerate(schedule(options["seed"], kinds)):
        if perf_counter() + fault.pause_s > deadline:
            break
        injected = await inject(fault, number, processes.of_kind, answers)
        if injected is not None:
            faults.append(injected)
            took = injected.end - injected.begin
            print(f"{fault.action} {fault.kind}: well again after {took:.2f} s", file=sys.stderr, flush=True)
    return faults


def _problems(verdict: Verdict) -> list[str]:
    problems = []
    if verdict.lost:
        first = verdict.lost[0].failure
        assert first is not None
        problems.append(f"{len(verdict.lost)} streams were lost; the first: {first.kind}, {first.message}")
    if verdict.different:
        problems.append(f"{len(verdict.different)} streams had another text than the undisturbed ones.")
    return problems


async def _leftovers(url: str, key: str | None, processes: ServerProcesses, before: dict[str, int]) -> list[str]:
    """Processes beyond those of the beginning, and KV blocks that no request holds."""
    problems = []
    for kind, count in before.items():
        now = len(processes.of_kind(kind))
        if now > count:
            problems.append(f"There are {now} processes of kind {kind}; there were {count}.")
    deadline, used = perf_counter() + _BLOCKS_BACK_WITHIN_S, await _blocks_used(url, key)
    while used and perf_counter() < deadline:
        await asyncio.sleep(0.5)
        used = await _blocks_used(url, key)
    if used:
        problems.append(f"{used:.0f} KV blocks are in use without a request.")
    return problems


async def _blocks_used(url: str, key: str | None) -> float:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{url}/metrics") as response:
        return sum(float(number) for number in _BLOCKS.findall(await response.text()))
