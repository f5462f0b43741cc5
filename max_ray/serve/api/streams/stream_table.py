"""StreamTable: the resumable streams of one replica: begun here, or brought here from another one.

A stream is made by a task of its own that writes an EventLog; connections read it. The journal gets the tokens of all
streams in one message, ten times a second while there are any.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

from max_ray.errors import InputError, MaxRayError, NotFoundError, WorkerGroupError, quoted
from max_ray.log import get_logger
from max_ray.serve.api.access.caller import CALLER
from max_ray.serve.api.answer import new_answer, new_answer_id, prepared
from max_ray.serve.api.engine import Engine
from max_ray.serve.api.openai import RESUMABLE
from max_ray.serve.api.streams.choice_log import ChoiceLog
from max_ray.serve.api.streams.cursor import parse_cursor
from max_ray.serve.api.streams.journal import KeptStream, Order, StreamJournal, StreamStart, StreamState
from max_ray.serve.api.streams.live_stream import LiveStream, StreamReader
from max_ray.serve.api.streams.snapshot import (
    ResumedGeneration,
    Snapshot,
    TextRequest,
    check_resumable,
    replayed,
    tapped,
)

_LOG = get_logger(__name__)
FLUSH_EVERY_S = 0.1
HEARTBEAT_EVERY_S = 1.0


class StreamTable:
    """The table.

    Args:
        engine: Of the replica.
        journal: Of the application.
        replica: Name of this replica, different after each start.
        grace_s: Seconds that a stream without a reader goes on or, complete, is kept; 0: no stream is resumable.
    """

    def __init__(self, engine: Engine, journal: StreamJournal, replica: str, grace_s: float) -> None:
        self._engine = engine
        self._journal = journal
        self._replica = replica
        self._grace_s = grace_s
        self._streams: dict[str, LiveStream] = {}
        self._resuming: dict[str, asyncio.Task[LiveStream]] = {}
        self._has_news = asyncio.Event()
        self._flushing: asyncio.Task[None] | None = None

    async def open(self, request: TextRequest, arrival: float, *, has_deadline: bool) -> StreamReader:
        """Begins a stream, and reads it.

        Args:
            request: Asks for a resumable stream.
            arrival: perf_counter() when the request came.
            has_deadline: Whether the request has a time-out.

        Raises:
            InputError, QueueFullError, InsufficientBlocksError, WorkerGroupError: It is not begun.
        """
        if not self._grace_s:
            raise InputError(
                "This server keeps no stream (resume_grace_s is 0). Leave stream_options.resumable out.",
                param=RESUMABLE,
            )
        check_resumable(request, has_deadline=has_deadline)
        job, generation = await prepared(self._engine, request, arrival)
        snapshot = Snapshot.of(request, job, generation, new_answer_id(request), int(time.time()))
        packed = snapshot.pack()
        num_bytes = len(packed) + snapshot.num_bytes
        owner = CALLER.get().name
        start = StreamStart(snapshot.answer_id, owner, 0, packed, generation.num_choices, num_bytes)
        await self._journal.register(self._replica, start)
        stream = self._new_stream(start, [ChoiceLog() for _ in generation.choices], is_owned=True)
        try:
            generation.start()
        except BaseException:
            stream.give_up(StreamState.CLOSED, None)
            raise
        finally:
            self._note_news()
        note = partial(self._note, stream)
        for choice in generation.choices:
            assert choice.stream is not None
            choice.stream = tapped(choice.stream, choice.index, note)
        stream.run(new_answer(self._engine, request, generation, snapshot.answer_id, snapshot.created))
        return stream.reader([0] * generation.num_choices)

    async def resume(self, stream_id: str, last_id: str | None) -> StreamReader:
        """Reads a stream on, wherever it was.

        Args:
            stream_id: Id of its answer.
            last_id: Id of the last event that the client has; None: it has none.

        Raises:
            NotFoundError: It is not kept, or is another key's.
            InputError: `last_id` is no id of an event.
            QueueFullError, InsufficientBlocksError, WorkerGroupError: Try again.
        """
        stream = await self._found(stream_id)
        return stream.reader(parse_cursor(last_id, stream.events.num_choices))

    async def end(self, stream_id: str) -> None:
        """Ends a stream, wherever it is. Raises NotFoundError, WorkerGroupError."""
        stream = await self._found(stream_id)
        stream.give_up(StreamState.CLOSED, NotFoundError("The stream was ended by a request.", param="stream_id"))
        self._note_news()

    async def close(self) -> None:
        """Ends all tasks. What the journal has is kept there."""
        tasks = [task for stream in self._streams.values() if (task := stream.task) is not None]
        tasks += [self._flushing] if self._flushing is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _new_stream(self, start: StreamStart, logs: list[ChoiceLog], *, is_owned: bool) -> LiveStream:
        stream = self._streams[start.stream_id] = LiveStream(start, logs, self._has_news.set, is_owned=is_owned)
        return stream

    async def _found(self, stream_id: str) -> LiveStream:
        stream = self._here(stream_id)
        owner = await self._journal.owner_of(stream_id) if stream is None else stream.start.owner
        if owner is None or not CALLER.get().may_read(owner):
            raise NotFoundError(
                f"There is no stream {quoted(stream_id)}: one that was asked for with stream_options.resumable is kept "
                f"for {self._grace_s:g} s without a reader.",
                param="stream_id",
            )
        return stream or self._here(stream_id) or await self._brought(stream_id)

    def _here(self, stream_id: str) -> LiveStream | None:
        stream = self._streams.get(stream_id)
        return stream if stream is not None and stream.is_readable else None

    async def _brought(self, stream_id: str) -> LiveStream:
        """From the journal; once, however many ask."""
        task = self._resuming.get(stream_id)
        if task is None:
            task = self._resuming[stream_id] = asyncio.create_task(self._bring(stream_id))
            task.add_done_callback(lambda _: self._resuming.pop(stream_id))
        return await asyncio.shield(task)

    async def _bring(self, stream_id: str) -> LiveStream:
        kept = await self._journal.claim(self._replica, stream_id)
        if kept is None:
            raise NotFoundError(f"The stream {quoted(stream_id)} has just ended.", param="stream_id")
        stream = self._new_stream(kept.start, kept.choices, is_owned=not kept.is_ended)
        try:
            self._go_on(stream, kept)
        except MaxRayError:
            stream.give_up(StreamState.RELEASED, None)
            raise
        finally:
            self._note_news()
        return stream

    def _go_on(self, stream: LiveStream, kept: KeptStream) -> None:
        snapshot = Snapshot.unpack(kept.start.request)
        logs = [log.copy() for log in kept.choices]
        generation = ResumedGeneration(self._engine, snapshot, logs, is_ended=kept.is_ended)
        for log, own in zip(logs, stream.logs, strict=True):
            own.prompt_entries = list(log.prompt_entries)
        generation.start()
        note = partial(self._note, stream)
        for choice, log in zip(generation.choices, logs, strict=True):
            rest = None if choice.stream is None else tapped(choice.stream, choice.index, note)
            choice.stream = replayed(log.outputs(choice.context.request_id), rest)
        stream.run(new_answer(self._engine, snapshot.request, generation, snapshot.answer_id, snapshot.created))
        _LOG.info("the stream %s goes on here, after %s tokens", stream.start.stream_id, sum(stream.num_written))

    def _note(self, stream: LiveStream, index: int, output: Any) -> None:
        stream.logs[index].note(output)
        self._has_news.set()

    def _note_news(self) -> None:
        self._has_news.set()
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._keep_written())

    async def _keep_written(self) -> None:
        is_silent = False
        while self._streams:
            try:
                await self._write()
                is_silent = False
            except WorkerGroupError as error:
                if not is_silent:
                    _LOG.warning("resumable streams were not written down: %s", error)
                is_silent = True
            self._end_unread()
            await asyncio.sleep(FLUSH_EVERY_S)
            try:
                async with asyncio.timeout(HEARTBEAT_EVERY_S):
                    await self._has_news.wait()
            except TimeoutError:
                continue

    async def _write(self) -> None:
        """One message to the journal, and what follows from its answer. Raises WorkerGroupError."""
        self._has_news.clear()
        told = [stream for stream in self._streams.values() if stream.is_owned]
        news = [stream.news() for stream in told]
        orders = await self._journal.update(self._replica, news) if news else {}
        for stream, one in zip(told, news, strict=True):
            stream.was_written(one)
            await self._obey(stream, orders.get(one.stream_id))
        for stream_id, stream in list(self._streams.items()):
            if not stream.is_owned and not stream.is_readable and self._streams.get(stream_id) is stream:
                del self._streams[stream_id]

    async def _obey(self, stream: LiveStream, order: Order | None) -> None:
        if order is None:
            return
        if order is Order.BEGIN_AGAIN:
            await self._begin_again(stream)
            return
        elsewhere = WorkerGroupError("The stream was resumed at another replica.")
        stream.give_up(StreamState.RELEASED, elsewhere)
        if order is Order.STOP:
            stream.is_owned = False
        self._has_news.set()

    async def _begin_again(self, stream: LiveStream) -> None:
        if not stream.is_readable:
            stream.is_owned = False
            return
        try:
            await self._journal.register(self._replica, stream.start)
        except MaxRayError as error:
            _LOG.warning("the stream %s cannot be resumed any more: %s", stream.start.stream_id, error)
            stream.is_owned = False
        else:
            stream.write_all()
            self._has_news.set()

    def _end_unread(self) -> None:
        now = time.monotonic()
        for stream in self._streams.values():
            if stream.is_readable and stream.unread_for(now) > self._grace_s:
                stream.give_up(StreamState.CLOSED, None)
                self._has_news.set()
