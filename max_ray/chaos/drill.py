"""The drill: load, faults by schedule, verdict."""

from __future__ import annotations

import asyncio
import math
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice, takewhile
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from max_ray import settings
from max_ray.benchmark.client import Client, normal_url
from max_ray.chaos.faults import Fault, Injected, inject, schedule
from max_ray.chaos.processes import KINDS, ServerProcesses
from max_ray.chaos.rounds import RoundFile, round_of, table, totals
from max_ray.chaos.streams import Load, Stream
from max_ray.chaos.verdict import judge
from max_ray.errors import ConfigError, ServerFailedError
from max_ray.planning.memory_plan import aligned

_PROBE = {"prompt": "x", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
_BLOCKS_BACK_WITHIN_S = 15.0
_DURATION_S = 60.0
_BLOCKS = re.compile(r"^max_ray_kv_blocks_used\{[^}]*\} (\S+)$", re.MULTILINE)


def run_drill(options: dict[str, Any]) -> None:
    """Runs the drill and prints its table. Raises ConfigError for wrong flags, ServerFailedError on a loss."""
    kinds = [kind.strip() for kind in (options["kinds"] or ",".join(KINDS)).split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigError(f"--kinds takes {', '.join(KINDS)}, not {options['kinds']!r}.")
    asyncio.run(_drill(options, kinds))


async def _drill(options: dict[str, Any], kinds: list[str]) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # no process is left stopped
    url = normal_url(options["base_url"])
    key = settings.variable(options["api_key_env"]) if options["api_key_env"] else None
    kept = RoundFile(Path(options["resume"]) if options["resume"] else None, options["seed"], kinds)
    processes = ServerProcesses.find(urlsplit(url).port or 80)
    async with Client(url, api_key=key, timeout_s=300) as client:
        model = await client.first_model()
        load = Load(client, model, options["streams"], options["max_tokens"])
        await load.learn()
        before = {kind: len(processes.of_kind(kind)) for kind in KINDS}
        drill = _Drill(load, kept, processes, client, model)
        running = asyncio.create_task(load.run())
        try:
            await drill.run(schedule(options["seed"], kinds), _limit_s(options), options["rounds"])
        finally:
            load.stop()
            with suppress(asyncio.CancelledError):
                await running
            drill.note_rounds()
    print(aligned(table(kept.rounds)))
    problems = _problems(drill, kept) + await _leftovers(url, key, processes, before)
    whole, resumed, cut, lost, different = totals(kept.rounds)
    print(
        f"{sum(bool(one.kind) for one in kept.rounds)} faults; streams: {whole} whole ({resumed} of them resumed), "
        f"{cut} cut or refused while their connection's process was away, {lost} lost, {different} different"
    )
    if problems:
        raise ServerFailedError(" ".join(problems))


def _limit_s(options: dict[str, Any]) -> float:
    if options["duration"] is not None:
        return float(options["duration"])
    return _DURATION_S if options["rounds"] is None else math.inf


class _Drill:
    """The rounds of one call of the command. A round is noted one round later: its streams have ended then."""

    def __init__(self, load: Load, kept: RoundFile, processes: ServerProcesses, client: Client, model: str) -> None:
        self.first_loss: Stream | None = None
        self._load = load
        self._kept = kept
        self._processes = processes
        self._client = client
        self._model = model
        self._faults: list[Injected] = []
        self._rounds: list[tuple[int, Injected | None]] = []
        self._num_judged = 0

    async def run(self, faults: Iterator[Fault], limit_s: float, num_rounds: int | None) -> None:
        """Until the time or the number of rounds is over. Rounds that are kept are passed over."""
        deadline = perf_counter() + limit_s
        done = len(self._kept.rounds)
        for number, fault in islice(enumerate(faults), done, num_rounds):
            if perf_counter() + fault.pause_s > deadline:
                break
            injected = await inject(fault, number, self._processes.of_kind, self._answers)
            if injected is not None:
                self._faults.append(injected)
                self.note_rounds(injected.begin)
            self._rounds.append((number, injected))
            if injected is not None:
                told = f"{number}: {fault.action} {fault.kind}: well again after {injected.end - injected.begin:.2f} s"
                print(told, file=sys.stderr, flush=True)

    def note_rounds(self, until: float = math.inf) -> None:
        """Keeps the rounds that are not kept yet, with the streams that ended before a time.

        Args:
            until: When the next fault began, in seconds of `perf_counter`.
        """
        for number, injected in self._rounds:
            ended = list(takewhile(lambda stream: stream.end < until, self._load.streams[self._num_judged :]))
            self._num_judged += len(ended)
            verdict = judge(ended, self._faults)
            self.first_loss = self.first_loss or next(iter(verdict.lost), None)
            self._kept.add(round_of(number, injected, self._load.streams, verdict))
        self._rounds.clear()

    async def _answers(self) -> bool:
        recording = await self._client.post("completions", {"model": self._model, **_PROBE}, perf_counter())
        return recording.failure is None


def _problems(drill: _Drill, kept: RoundFile) -> list[str]:
    *_, lost, different = totals(kept.rounds)
    problems = []
    if lost:
        failure = None if drill.first_loss is None else drill.first_loss.failure
        told = "" if failure is None else f"; the first now: {failure.kind}, {failure.message}"
        problems.append(f"{lost} streams were lost{told}")
    if different:
        problems.append(f"{different} streams had another text than the undisturbed ones.")
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
