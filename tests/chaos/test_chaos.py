"""The parts of `max-ray chaos`, and the command against a server that serves, and one that loses tokens."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import pytest

from max_ray.benchmark.client import Failure
from max_ray.chaos import faults
from max_ray.chaos.faults import Fault, Injected, inject, schedule
from max_ray.chaos.processes import KINDS, ServerProcesses
from max_ray.chaos.resuming import keep_whole_events, post_resumable
from max_ray.chaos.rounds import Round, RoundFile, round_of, table, totals
from max_ray.chaos.streams import Load, Stream, longest_gap
from max_ray.chaos.verdict import Verdict, judge
from max_ray.errors import ConfigError, MaxRayError, ServerFailedError
from tests.serve.commands import BIN, environment, until_said
from tests.serve.conftest import free_port
from tests.serve.test_server_watch import serve_command

BROKEN = Failure("reset", "gone")
KILL_HAPROXY = Injected(Fault("haproxy", None, 1.0), begin=10, answered=10.5, end=40)
KILL_WORKER = Injected(Fault("worker", None, 1.0), begin=10, answered=13, end=14)


def test_the_schedule_follows_from_the_seed_and_covers_all_kinds() -> None:
    first, again, other = (list(itertools.islice(schedule(seed, list(KINDS)), 48)) for seed in (7, 7, 8))
    assert first == again != other
    for start in range(0, 48, len(KINDS)):
        assert {fault.kind for fault in first[start : start + len(KINDS)]} == set(KINDS)
    assert {fault.action for fault in first} == {"kill", "stop"}


@pytest.mark.parametrize(
    ("stream", "fault", "verdict"),
    [
        (Stream(1, 50, None, True), KILL_HAPROXY, "whole"),
        (Stream(1, 12, BROKEN, True), KILL_HAPROXY, "cut"),
        (Stream(39, 41, BROKEN, True), KILL_HAPROXY, "cut"),
        (Stream(1, 9, BROKEN, True), KILL_HAPROXY, "lost"),
        (Stream(41, 42, BROKEN, True), KILL_HAPROXY, "lost"),
        (Stream(1, 12, BROKEN, True), KILL_WORKER, "lost"),
        (Stream(1, 12, BROKEN, False), KILL_HAPROXY, "different"),
        (Stream(1, 12, None, False), KILL_WORKER, "different"),
        (Stream(1, 12, BROKEN, True, (2.0,), is_resumable=True), KILL_HAPROXY, "lost"),
        (Stream(1, 12, BROKEN, True, (), is_resumable=True), KILL_HAPROXY, "cut"),
        (Stream(1, 12, None, True, (2.0,), is_resumable=True, num_resumed=2), KILL_HAPROXY, "whole"),
    ],
)
def test_a_verdict_on_each_stream(stream: Stream, fault: Injected, verdict: str) -> None:
    judged = judge([stream], [fault])
    assert [name for name in ("whole", "cut", "lost", "different") if getattr(judged, name)] == [verdict]
    assert judged.is_good is (verdict in ("whole", "cut"))


def test_a_stopped_haproxy_may_cut_nothing() -> None:
    stopped = Injected(Fault("haproxy", 3.0, 1.0), begin=10, answered=13, end=13)
    assert judge([Stream(1, 12, BROKEN, True)], [stopped]).lost


def test_gaps_and_the_table() -> None:
    stream = Stream(0, 20, None, True, (1.0, 2.0, 13.0, 14.0))
    assert longest_gap([stream], 10, 14) == 11
    assert longest_gap([stream], 13.5, 14) == 1
    assert longest_gap([], 0, 1) == 0
    resumed = Stream(0, 30, None, True, (1.0,), is_resumable=True, num_resumed=1)
    later = Injected(KILL_WORKER.fault, begin=15, answered=16, end=20)
    first = round_of(0, KILL_WORKER, [stream], judge([stream, resumed], [KILL_WORKER]))
    nothing = round_of(1, None, [stream], Verdict([], [], [], []))
    rows = table([first, nothing, round_of(2, later, [stream], Verdict([], [stream], [stream], []))])
    times = ["2.00", "3.00", "4.50", "5.00", "5.50", "11.00"]
    assert rows[1:] == [["worker", "kill", "2", *times, "2", "1", "1", "1", "0"]]
    assert totals([first, first]) == [4, 2, 0, 0, 0]


def test_rounds_are_kept_and_belong_to_one_schedule(tmp_path: Path) -> None:
    path = tmp_path / "rounds"
    one = Round(0, "worker", "kill", 1.0, 2.0, 3.0, 4, 5, 6, 7, 8)
    RoundFile(path, 7, ["worker"]).add(one)
    again = RoundFile(path, 7, ["worker"])
    assert again.rounds == [one]
    for seed, kinds in ((8, ["worker"]), (7, ["registry"])):
        with pytest.raises(ConfigError, match="is of a drill with"):
            RoundFile(path, seed, kinds)
    path.write_text("{}\n{}\n")
    with pytest.raises(ConfigError, match="holds no rounds"):
        RoundFile(path, 7, ["worker"])


EVENTS = [f'id: {n}\ndata: {{"choices": [{{"text": "{n}"}}]}}\n\n'.encode() for n in range(1, 5)]
END = [
    b'id: 5\ndata: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n',
    b'id: 6\ndata: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 4}}\n\n',
    b"id: 7\ndata: [DONE]\n\n",
]
ERROR = b'data: {"error": {"message": "gone"}}\n\n'


@pytest.mark.parametrize("last", [b"", ERROR, ERROR[:9], EVENTS[2][:7], EVENTS[2][:-1]])
def test_whole_events_are_kept_however_they_were_read(last: bytes) -> None:
    given = b"".join(EVENTS[:2]) + last
    for cut in range(1, len(given)):
        recording = streams_recording(0.0, "")
        recording.reads, recording.times = [given[:cut], given[cut:]], [1.0, 2.0]
        keep_whole_events(recording)
        assert b"".join(recording.reads) == b"".join(EVENTS[:2])
        assert len(recording.reads) == len(recording.times)


class BreakingClient:
    """A server whose connections break, at places of their own, or refuse."""

    def __init__(self, *parts: bytes | Failure) -> None:
        self.parts = list(parts)
        self.asked: list[str] = []

    async def post(self, endpoint: str, body: dict[str, Any], due: float) -> Any:
        recording = streams_recording(due, "")
        recording.reads.clear()
        recording.times.clear()
        await self.read_on("", recording)
        return recording

    async def read_on(self, path: str, recording: Any) -> None:
        part = self.parts.pop(0)
        self.asked.append(path)
        recording.failure = part if isinstance(part, Failure) else BROKEN if self.parts else None
        if isinstance(part, bytes):
            recording.reads.append(part)
            recording.times.append(perf_counter())


async def test_a_stream_is_read_on_until_it_is_whole() -> None:
    all_events = EVENTS + END
    refused = Failure("http_503", "not yet")
    client = BreakingClient(b"".join(EVENTS[:2]) + ERROR, refused, EVENTS[2] + EVENTS[3][:5], b"".join(all_events[3:]))
    recording, num_resumed = await post_resumable(client, {}, "cmpl-x")  # type: ignore[arg-type]
    assert b"".join(recording.reads) == b"".join(all_events)
    assert (recording.failure, num_resumed) == (None, 2)
    assert client.asked[1:] == [f"/v1/streams/cmpl-x?from={number}" for number in (2, 2, 3)]


async def test_a_stream_that_the_server_does_not_have_fails_as_it_did_first() -> None:
    for parts in ([Failure("connect", "")], [EVENTS[0], Failure("connect", "")]):
        client = BreakingClient(*parts, Failure("http_404", "no such stream"))
        recording, _ = await post_resumable(client, {}, "cmpl-x")  # type: ignore[arg-type]
        assert recording.failure is not None
        assert recording.failure.kind in ("connect", "reset")


class Processes:
    """A process that is killed or stopped, and replaced when it has gone."""

    def __init__(self, *, replaces: bool = True) -> None:
        self.replaces = replaces
        self.all: list[Any] = [self._new()]
        self.num_answers = 0

    def _new(self) -> Any:
        return psutil.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def of_kind(self, kind: str) -> list[Any]:
        if self.all[-1].poll() is not None and self.replaces:
            self.all.append(self._new())
        return [process for process in self.all if process.poll() is None]

    async def answers(self) -> bool:
        self.num_answers += 1
        return self.num_answers % 3 == 0


async def test_a_fault_waits_for_an_answer_and_for_the_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Processes()
    killed = await inject(Fault("worker", None, 0.0), 0, given.of_kind, given.answers)
    assert killed is not None
    assert len(given.all) == 2
    assert given.num_answers >= 6
    stopped = await inject(Fault("worker", 0.3, 0.0), 5, given.of_kind, given.answers)
    assert stopped is not None
    assert stopped.answered - stopped.begin >= 0.3
    assert given.all[-1].status() != psutil.STATUS_STOPPED
    given.replaces = False
    monkeypatch.setattr(faults, "_REPLACED_WITHIN_S", 0.3)
    with pytest.raises(ServerFailedError, match="kill of a worker"):
        await inject(Fault("worker", None, 0.0), 0, given.of_kind, given.answers)
    assert await inject(Fault("worker", None, 0.0), 0, given.of_kind, given.answers) is None


class FakeClient:
    """A server's answers as recordings. Of two streams none is resumable."""

    def __init__(self, text: Callable[[int], str]) -> None:
        self.text = text
        self.num_posts = 0

    async def post(self, endpoint: str, body: dict[str, Any], due: float) -> Any:
        await asyncio.sleep(0.001)
        self.num_posts += 1
        usage = '"usage": {"prompt_tokens": 1, "completion_tokens": 1}'
        text = self.text(self.num_posts)
        data = f'data: {{"choices": [{{"text": "{text}", "finish_reason": "length"}}], {usage}}}\n\ndata: [DONE]\n\n'
        recording = streams_recording(due, data)
        if text == "a":
            recording.reads = [recording.reads[0].replace(b"data: [DONE]", b"")]
        return recording


def streams_recording(due: float, data: str) -> Any:
    from max_ray.benchmark.client import Recording

    return Recording(due, 1, start=due, end=perf_counter(), times=[perf_counter()], reads=[data.encode()])


async def streams_of(text: Callable[[int], str]) -> list[Stream]:
    load = Load(FakeClient(text), "m", 2, 1)  # type: ignore[arg-type]
    await load.learn()
    running: Awaitable[None] = asyncio.create_task(load.run())
    await asyncio.sleep(0.1)
    load.stop()
    await running
    return load.streams


async def test_streams_are_compared_with_the_undisturbed_ones() -> None:
    monotonous = await streams_of(lambda number: "ab")
    assert all(stream.is_equal and stream.failure is None for stream in monotonous)
    torn = await streams_of(lambda number: "a" if number > 6 else "ab")
    assert {(stream.is_equal, stream.failure is None) for stream in torn[4:]} == {(True, False)}
    other = await streams_of(lambda number: "abc" if number > 6 else "ab")
    assert not any(stream.is_equal for stream in other[4:])
    with pytest.raises(MaxRayError, match="other texts"):
        await streams_of(str)


def test_chaos_needs_a_local_server() -> None:
    with pytest.raises(ConfigError, match="listens on port"):
        ServerProcesses.find(free_port())
    command = [BIN / "max-ray", "chaos", "--base-url", f"http://127.0.0.1:{free_port()}"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert run.returncode == 2
    assert "chaos needs a local one" in run.stderr
    run = subprocess.run([*command, "--kinds", "disk"], capture_output=True, text=True, env=environment(), timeout=60)
    assert "--kinds takes worker, kv_manager" in run.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_short_drill_loses_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    port = free_port()
    with until_said(serve_command(tiny_llama, port), "Serving", tmp_path / "log"):
        drill = [BIN / "max-ray", "chaos", "--base-url", f"http://127.0.0.1:{port}", "--seed", "7"]
        drill += ["--resume", str(tmp_path / "rounds")]
        for rounds in ("6", "12"):
            command = [*drill, "--rounds", rounds]
            run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500)
            print(run.stdout, run.stderr)
            assert run.returncode == 0, run.stderr
            assert f"{rounds} faults" in run.stdout
            assert " 0 lost, 0 different" in run.stdout
    kept = RoundFile(tmp_path / "rounds", 7, list(KINDS)).rounds
    assert [one.number for one in kept] == list(range(12))
    assert sum(one.resumed for one in kept) > 0
