"""OutputQueue and TokenStream, and the answer to a full queue."""

from __future__ import annotations

import asyncio

import pytest

from max_ray.interfaces import GenerationStatus, RequestID, TextGenerationOutput
from max_ray.scheduler import OutputQueue, TokenStream
from max_ray.scheduler.stats import CompletionRate


def output(*tokens: int, done: bool = False) -> TextGenerationOutput:
    status = GenerationStatus.END_OF_SEQUENCE if done else GenerationStatus.ACTIVE
    return TextGenerationOutput(request_id=RequestID("a"), tokens=list(tokens), final_status=status)


async def test_outputs_come_in_order_and_the_last_one_ends_the_stream() -> None:
    queue = OutputQueue()
    stream = TokenStream(queue, lambda: None)
    reader = asyncio.create_task(_all(stream))
    for item in (output(1), output(2), output(3, done=True), output(4)):
        queue.put(item)
        await asyncio.sleep(0)
    assert [o.tokens for o in await reader] == [[1], [2], [3]]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_what_came_before_an_error_is_read_first() -> None:
    queue = OutputQueue()
    stream = TokenStream(queue, lambda: None)
    queue.put(output(1))
    queue.fail(ValueError("late"))
    queue.fail(KeyError("later"))
    assert (await anext(stream)).tokens == [1]
    for _ in range(2):
        with pytest.raises(ValueError, match="late"):
            await anext(stream)


async def test_a_reader_is_woken_once_for_all_that_has_come() -> None:
    queue = OutputQueue()
    stream = TokenStream(queue, lambda: None)
    reader = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    queue.put(output(1))
    queue.put(output(2))
    assert (await reader).tokens == [1, 2]
    await stream.aclose()


async def test_tokens_before_a_cancellation_are_read_by_themselves() -> None:
    queue = OutputQueue()
    queue.put(output(1))
    queue.put(output(2))
    queue.put(TextGenerationOutput(request_id=RequestID("a"), final_status=GenerationStatus.CANCELLED))
    assert (await queue.get()).tokens == [1, 2]
    assert (await queue.get()).final_status is GenerationStatus.CANCELLED


async def test_two_readers_are_a_mistake() -> None:
    queue = OutputQueue()
    first = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    with pytest.raises(AssertionError, match="two readers"):
        await queue.get()
    queue.put(output(1, done=True))
    assert (await first).is_done


async def test_closing_cancels_once_and_only_what_has_not_ended() -> None:
    cancelled: list[str] = []
    queue = OutputQueue()
    stream = TokenStream(queue, lambda: cancelled.append("a"))
    queue.put(output(1))
    await stream.aclose()
    await stream.aclose()
    assert await anext(stream, None) is None
    ended = OutputQueue()
    ended.put(output(1, done=True))
    await TokenStream(ended, lambda: cancelled.append("b")).aclose()
    assert cancelled == ["a"]


async def _all(stream: TokenStream) -> list[TextGenerationOutput]:
    return [item async for item in stream]


def test_retry_after_follows_the_recent_rate() -> None:
    rate = CompletionRate(window=4)
    assert rate.retry_after(100, 5.0) == 1.0, "nothing is known yet"
    for now in (0.0, 1.0, 2.0, 3.0):
        rate.note(now)
    assert rate.retry_after(8, 4.0) == pytest.approx(8.0)
    assert rate.retry_after(0, 4.0) == 1.0
    assert rate.retry_after(1, 40.0) == pytest.approx(10.0), "nobody ended lately"
    assert rate.retry_after(10_000, 4.0) == 60.0
