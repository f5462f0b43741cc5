"""GenerationLoop, ends that are not the model's: cancel, disconnect, dead workers, our own mistakes, shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from max_ray.errors import MaxRayError, StaleLeaseError, WorkerGroupError
from max_ray.interfaces import GenerationStatus, KVCacheClient, RequestID
from max_ray.scheduler import recovery
from tests.scheduler.fakes import expected_tokens, make_context
from tests.scheduler.harness import Harness, running


async def test_cancel_takes_effect_at_the_next_step_boundary() -> None:
    async with running(max_num_steps=1000) as h:
        other = asyncio.create_task(h.generate("b", range(40, 44), num_new=40))
        context = make_context("a", range(5), 500)
        stream = h.loop.submit(context)
        got = [await anext(stream) for _ in range(6)]
        steps = h.pipeline.num_steps
        h.loop.cancel(RequestID("a"))
        rest = [output async for output in stream]
        assert rest[-1].final_status is GenerationStatus.CANCELLED
        assert [t for o in got for t in o.tokens] == expected_tokens(list(range(5)), 6)
        await other
        assert context.status is GenerationStatus.CANCELLED
        assert context.tokens.generated_length <= steps + 1
    assert h.loop.stats.cancelled == 1
    assert h.loop.stats.finished == 1


async def test_cancel_of_a_waiting_request_ends_it_at_once() -> None:
    async with running(max_batch_size=1) as h:
        first = asyncio.create_task(h.generate("a", range(4), num_new=20))
        await h.at_step(1)
        stream = h.loop.submit(make_context("b", range(4)))
        h.loop.cancel(RequestID("b"))
        assert h.loop.stats.queued == 0
        assert [o.final_status for o in [output async for output in stream]] == [GenerationStatus.CANCELLED]
        h.loop.cancel(RequestID("b"))
        h.loop.cancel(RequestID("never seen"))
        await first
    assert h.loop.stats.cancelled == 1


async def test_cancel_while_the_first_lease_is_on_its_way() -> None:
    """The answer finds the row gone, or another request under its id: the grant goes back."""
    async with running() as h:
        h.ledger.gate.clear()
        stream = h.loop.submit(make_context("a", range(9)))
        while not h.ledger.num_called:
            await asyncio.sleep(0)
        h.loop.cancel(RequestID("a"))
        assert len([output async for output in stream]) == 1
        again = asyncio.create_task(h.generate("a", range(20, 27), num_new=5))
        await asyncio.sleep(0)
        h.ledger.gate.set()
        await again
    assert h.loop.stats.cancelled == 1
    assert ["a"] in [request.releases for request in h.ledger.requests]


@pytest.mark.parametrize("way", ["aclose", "drop", "cancel the reader"])
async def test_a_reader_that_goes_away_cancels(way: str) -> None:
    async with running(max_num_steps=1000) as h:
        other = asyncio.create_task(h.generate("b", range(40, 44), num_new=30))
        stream = h.loop.submit(make_context("a", range(5), 10_000))
        await anext(stream)
        if way == "aclose":
            await stream.aclose()
            await stream.aclose()
            assert await anext(stream, None) is None
        elif way == "drop":
            del stream
            gc.collect()
        else:
            reader = asyncio.create_task(_read(stream))
            await h.at_step(4)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        await other
        await h.settle()
        assert h.loop.stats.cancelled == 1
        assert h.pipeline.num_steps < 1000


async def _read(stream: object) -> None:
    async for _ in stream:  # type: ignore[attr-defined]
        pass


async def test_a_finished_stream_that_is_dropped_cancels_nothing() -> None:
    async with running() as h:
        await h.generate("a", range(4))
        gc.collect()
    assert h.loop.stats.cancelled == 0


async def test_the_blocks_of_a_hung_up_client_serve_the_next_one() -> None:
    async with running(num_blocks=8, page_size=4, max_num_steps=1000) as h:
        stream = h.loop.submit(make_context("a", range(20), 10_000))
        await anext(stream)
        waiting = asyncio.create_task(h.generate("b", range(50, 74), num_new=3))
        await asyncio.sleep(0)
        await stream.aclose()
        await waiting


@pytest.mark.parametrize("kind", ["before", "lost", "after"])
@pytest.mark.parametrize("step", [0, 1, 3, 6, 11])
@pytest.mark.parametrize("max_num_steps", [1, 8])
async def test_dead_workers_cost_no_token(kind: str, step: int, max_num_steps: int) -> None:
    async with running(budget=6, recover=True, max_num_steps=max_num_steps) as h:
        h.pipeline.fail_at = {step: kind}
        await asyncio.gather(*(h.generate(f"r{i}", range(i, 3 * i + 4), num_new=9) for i in range(5)))
        assert h.loop.healthy
    assert h.loop.stats.recoveries == 1
    assert len(h.ledgers) == 2
    assert h.loop.stats.failed == 0
    assert h.loop.stats.generated_tokens == 45


async def test_requests_go_on_in_their_old_order_after_a_recovery() -> None:
    async with running(recover=True, max_batch_size=2) as h:
        h.pipeline.fail_at = {4: "after"}
        await asyncio.gather(*(h.generate(f"r{i}", range(10 * i, 10 * i + 4), num_new=9) for i in range(4)))
    index = next(i for i, x in enumerate(h.pipeline.runs) if x.num_tokens > 8)
    assert list(h.pipeline.runs[index].rows) == ["r0", "r1"]


async def test_the_same_ledger_may_come_back_emptied() -> None:
    async with running(recover=False) as h:

        async def recover() -> None:
            h.ledger.manager.reset()

        h.loop._recovery.recover = recover
        h.pipeline.fail_at = {3: "after"}
        await asyncio.gather(h.generate("a", range(9)), h.generate("b", range(30, 35)))
    assert h.loop.stats.recoveries == 1


async def test_without_recovery_every_stream_gets_the_error() -> None:
    async with running(max_batch_size=1, check=False) as h:
        h.pipeline.fail_at = {2: "before"}
        streams = [h.loop.submit(make_context(name, range(4))) for name in "ab"]
        for stream, expected in zip(streams, [2, 0], strict=True):
            for _ in range(expected):
                await anext(stream)
            with pytest.raises(WorkerGroupError, match="rank 1 died"):
                await anext(stream)
        assert not h.loop.healthy
        await h.generate("c", range(4))
        assert h.loop.healthy, "the workers answer again"


async def test_failures_in_a_row_end_the_streams_and_the_next_request_starts_afresh() -> None:
    """Three requests are found to be poison one after another, the last of them for all that wait."""
    async with running(recover=True, max_batch_size=5) as h:
        die = h.pipeline._die
        h.pipeline._die = lambda step, kind: _always(h.pipeline.error)  # type: ignore[method-assign]
        answers = await asyncio.gather(
            *(h.generate(f"r{i}", range(i, i + 4)) for i in range(5)), return_exceptions=True
        )
        assert all(isinstance(answer, WorkerGroupError) for answer in answers)
        await h.until(lambda: h.loop.healthy, "the workers are back, though nobody has asked")
        assert h.loop.stats.recoveries == 8
        h.pipeline._die = die  # type: ignore[method-assign]
        h.pipeline.tables.clear()
        h.pipeline.fail_at = {0: "before"}
        await h.generate("b", range(4))
        assert h.loop.stats.recoveries == 9


def _always(error: object) -> None:
    raise error()  # type: ignore[operator]


async def test_progress_between_failures_resets_their_count() -> None:
    async with running(recover=True, max_num_steps=1) as h:
        h.pipeline.fail_at = dict.fromkeys(range(0, 12, 2), "after")
        await h.generate("a", range(4), num_new=12)
    assert h.loop.stats.recoveries == 6


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("poison", ["r0", "r2", "r4"])
@pytest.mark.parametrize("budget", [4, 64])
async def test_the_request_that_takes_the_workers_down_ends_alone(poison: str, after: int, budget: int) -> None:
    async with running(recover=True, can_extend=True, budget=budget, max_batch_size=5) as h:
        h.pipeline.poison = {poison: after}
        names = [f"r{i}" for i in range(5)]
        answers = await asyncio.gather(
            *(h.generate(name, range(i, 3 * i + 4), num_new=9) for i, name in enumerate(names)), return_exceptions=True
        )
        h.pipeline.poison = {}
        await h.generate("later", range(4))
        assert h.loop.healthy
    assert [name for name, answer in zip(names, answers, strict=True) if isinstance(answer, Exception)] == [poison]
    assert isinstance(answers[names.index(poison)], WorkerGroupError)
    assert h.loop.stats.recoveries <= 5


async def test_two_poison_requests_and_blocks_for_few() -> None:
    async with running(recover=True, num_blocks=10, max_batch_size=6) as h:
        h.pipeline.poison = {"r1": 3, "r2": 0}
        answers = await asyncio.gather(
            *(h.generate(f"r{i}", range(i, i + 5), num_new=7) for i in range(6)), return_exceptions=True
        )
    assert [i for i, answer in enumerate(answers) if isinstance(answer, Exception)] == [1, 2]


def failing(h: Harness, error: Callable[[], Exception], times: int) -> list[float]:
    """The next `times` recoveries raise; gives the moments of all of them."""
    recover, moments = h.loop._recovery.recover, []
    assert recover is not None

    async def attempt() -> KVCacheClient | None:
        moments.append(time.monotonic())
        if len(moments) <= times:
            raise error()
        return await recover()

    h.loop._recovery.recover = attempt
    return moments


@pytest.mark.parametrize("times", [1, recovery.MAX_FAILURES - 1])
async def test_a_recovery_that_fails_is_tried_again_and_the_streams_go_on(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies while its group is being rebuilt is a longer pause."""
    monkeypatch.setattr(recovery, "_FIRST_PAUSE_S", 0.01)
    async with running(recover=True) as h:
        moments = failing(h, lambda: WorkerGroupError("A worker died while it was starting"), times)
        h.pipeline.fail_at = {3: "after"}
        await h.generate("a", range(4), num_new=12)
        assert h.loop.healthy
    assert len(moments) == times + 1


async def test_a_recovery_that_goes_on_failing_ends_the_streams_and_goes_on_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody asks meanwhile: the loop is healthy again as soon as the workers are."""
    monkeypatch.setattr(recovery, "_FIRST_PAUSE_S", 0.005)
    async with running(recover=True, check=False) as h:
        moments = failing(h, lambda: WorkerGroupError("no room"), recovery.MAX_FAILURES + 2)
        h.pipeline.fail_at = {1: "before"}
        with pytest.raises(WorkerGroupError, match="no room"):
            await _read(h.loop.submit(make_context("a", range(4))))
        assert not h.loop.healthy
        await h.until(lambda: h.loop.healthy, "healthy without a request")
        assert len(moments) == recovery.MAX_FAILURES + 3
        pauses = [later - sooner for sooner, later in pairwise(moments)]
        assert all(pause > 0.005 * 2**number * 0.9 for number, pause in enumerate(pauses)), "they grow"
        await h.generate("b", range(4))


async def test_our_own_mistake_in_a_recovery_ends_the_streams_and_not_the_recovery(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "_FIRST_PAUSE_S", 0.01)
    async with running(recover=True, check=False) as h:
        failing(h, lambda: RuntimeError("no such node"), 2)
        h.pipeline.fail_at = {1: "before"}
        with pytest.raises(RuntimeError, match="no such node"):
            await _read(h.loop.submit(make_context("a", range(4))))
        await h.until(lambda: h.loop.healthy, "healthy without a request")


async def test_a_group_that_is_anothers_is_not_asked_for_again() -> None:
    async with running(recover=True, check=False) as h:
        moments = failing(h, lambda: StaleLeaseError("it has passed to another replica"), 99)
        h.pipeline.fail_at = {1: "before"}
        with pytest.raises(StaleLeaseError):
            await _read(h.loop.submit(make_context("a", range(4))))
        await asyncio.sleep(0.05)
        assert (len(moments), h.loop.healthy) == (1, False)


async def test_a_failure_that_is_reported_to_a_busy_loop_is_mended_too() -> None:
    """As of a rank that dies behind the last step: nothing that the loop does meets it."""
    async with running(recover=True) as h:
        busy = asyncio.create_task(h.generate("b", range(4), num_new=20))
        await h.at_step(3)
        h.loop.report_failure(WorkerGroupError("rank 1 does not answer"))
        await busy
        await h.until(lambda: len(h.ledgers) == 2, "one recovery")
        await h.settle()
        assert h.loop.healthy


async def test_dead_workers_found_while_idle_are_brought_back() -> None:
    async with running(recover=True) as h:
        await h.generate("a", range(4), num_new=1)
        h.ledger.error = WorkerGroupError("the KV manager died")
        await h.settle()
        await h.generate("b", range(4))
    assert len(h.ledgers) == 2


async def test_an_idle_loop_recovers_when_it_is_told_of_a_failure() -> None:
    async with running(recover=True) as h:
        await h.generate("a", range(4), num_new=1)
        await h.settle()
        h.loop.report_failure(WorkerGroupError("rank 0 does not answer"))
        while len(h.ledgers) == 1:
            await asyncio.sleep(0)
        await h.generate("b", range(4), num_new=20)
        await h.settle()
        assert h.loop.healthy
    assert h.loop.stats.recoveries == 1


async def test_our_own_mistake_fails_the_streams_once_and_keeps_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    async with running(error=lambda: ZeroDivisionError("a bug")) as h:
        h.pipeline.fail_at = {2: "before"}
        streams = [h.loop.submit(make_context(name, range(4))) for name in "ab"]
        for stream in streams:
            with pytest.raises(ZeroDivisionError, match="a bug"):
                await _read(stream)
        await h.generate("c", range(20, 24))
        assert h.loop.healthy
    assert [r.levelno for r in caplog.records if r.name.startswith("max_ray")] == [logging.ERROR]
    assert h.loop.stats.failed == 2


async def test_a_lease_that_went_to_another_replica_is_not_healthy() -> None:
    async with running(check=False) as h:
        h.ledger.error = StaleLeaseError("epoch 3 is over")
        with pytest.raises(StaleLeaseError):
            await _read(h.loop.submit(make_context("a", range(4))))
        assert not h.loop.healthy


async def test_a_flush_that_fails_is_tried_again_after_the_next_request(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as h:
        stream = h.loop.submit(make_context("a", range(4), 2))
        await anext(stream)
        h.ledger.error = RuntimeError("not now")
        await _read(stream)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(caplog.records) == 1, "no busy loop"
        h.ledger.error = None
        await h.generate("b", range(30, 34))


async def test_stopping_the_loop_ends_every_stream_with_a_reason() -> None:
    async with running(max_batch_size=1, check=False) as h:
        streams = [h.loop.submit(make_context(name, range(4), 10_000)) for name in "ab"]
        await anext(streams[0])
        task = next(t for t in asyncio.all_tasks() if "EngineLoop.run" in repr(t))
        task.cancel()
        for stream in streams:
            with pytest.raises(MaxRayError, match="stopping"):
                await _read(stream)
        with pytest.raises(MaxRayError, match="stopping"):
            h.loop.submit(make_context("c", range(4)))
        assert not h.loop.healthy


async def test_a_request_that_follows_at_once_takes_the_releases_along() -> None:
    async with running(flush_after_s=0.1, check=False) as h:
        await h.generate("a", range(4))
        await h.generate("b", range(4))
        assert h.ledger.flushes == []
        assert len(h.ledger.requests) == h.loop.stats.decisions == 2
        assert h.ledger.requests[1].releases == ["a"]
        await asyncio.sleep(0.3)
        assert h.ledger.flushes == [["b"]], "a loop that stays idle gives back by itself"
        h.assert_clean()


async def test_a_stopped_loop_ends_what_is_open_and_takes_no_more() -> None:
    async with running() as h:
        streams = [asyncio.create_task(h.generate(name, range(5), num_new=10_000)) for name in ("a", "b")]
        await h.at_step(2)
        assert h.loop.healthy
        h.loop.stop()
        for ended in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(ended, MaxRayError)
            assert "stopping" in str(ended)
        with pytest.raises(MaxRayError, match="stopping"):
            h.loop.submit(make_context("c", range(4)))
        assert not h.loop.healthy
        async with asyncio.timeout(5):
            while h.loop.stats.running:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", ["before", "lost", "after"])
@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("num_before", [1, 4])
async def test_a_request_that_began_elsewhere_gets_its_later_tokens_once(kind: str, step: int, num_before: int) -> None:
    """It comes with tokens that its reader has, also where the workers fail."""
    prompt, num_new = [1, 0, 1], 9
    expected = expected_tokens(prompt, num_new)
    async with running(recover=True) as h:
        context = make_context("r", prompt, num_new)
        context.extend(expected[:num_before])
        context.reset()
        h.pipeline.fail_at[step] = kind
        outputs = [output async for output in h.loop.submit(context)]
        assert [token for output in outputs for token in output.tokens] == expected[num_before:]
