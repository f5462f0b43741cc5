"""LiveStream: one resumable stream in a replica: the task that makes it, its events, its readers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from max_ray.errors import MaxRayError, ServerStoppingError, StaleLeaseError, WorkerGroupError
from max_ray.serve.api.answer import Answer
from max_ray.serve.api.streams.choice_log import ChoiceLog
from max_ray.serve.api.streams.event_log import EventLog
from max_ray.serve.api.streams.journal import StreamNews, StreamStart, StreamState

_OF_THE_REPLICA = (WorkerGroupError, ServerStoppingError, StaleLeaseError)
"""Errors after which a stream may go on elsewhere."""


class LiveStream:
    """One stream.

    Args:
        start: As the journal has it.
        logs: Tokens of each choice so far, which the journal has.
        note_end: Is called when nothing more is made.
        is_owned: Whether the journal is told of it.

    Attributes:
        events: What readers get.
        num_written: Tokens of each choice that the journal has.
        state: What the journal is told.
        task: Makes the stream.
    """

    def __init__(
        self, start: StreamStart, logs: list[ChoiceLog], note_end: Callable[[], None], *, is_owned: bool
    ) -> None:
        self.start = start
        self.logs = logs
        self._tell_end = note_end
        self.is_owned = is_owned
        self.events = EventLog(start.num_choices)
        self.num_written = [len(log.tokens) for log in logs]
        self.state = StreamState.RUNNING
        self.task: asyncio.Task[None] | None = None
        self._num_readers = 0
        self._unread_since = time.monotonic()
        self._answer: Answer | None = None

    @property
    def is_readable(self) -> bool:
        """Whether it is read from here; else the journal is asked where it is."""
        return self.state in (StreamState.RUNNING, StreamState.ENDED)

    def run(self, answer: Answer) -> None:
        """Makes the stream, in a task.

        Args:
            answer: Has been submitted; is closed at the end.
        """
        self._answer = answer
        self.task = asyncio.create_task(self._made(answer))
        self.task.add_done_callback(self._note_end)

    def reader(self, cursor: list[int]) -> StreamReader:
        """A connection's way through the events.

        Args:
            cursor: Events of each choice that the client has.
        """
        self._num_readers += 1
        return StreamReader(self, cursor)

    def detach(self) -> None:
        """A reader has gone."""
        self._num_readers -= 1
        self._unread_since = time.monotonic()

    def unread_for(self, now: float) -> float:
        """Seconds without a reader.

        Args:
            now: Monotonic seconds.
        """
        return 0.0 if self._num_readers else now - self._unread_since

    def give_up(self, state: StreamState, error: MaxRayError | None) -> None:
        """Ends it here.

        Args:
            state: What the journal is told.
            error: What readers get, where it is not complete.
        """
        self.state = state
        self.events.end(error or WorkerGroupError("The stream has ended here. Resume it, or send the request again."))
        if self.task is not None:
            self.task.cancel()

    def news(self) -> StreamNews:
        """What the journal does not know yet."""
        gained = [log.since(num) for log, num in zip(self.logs, self.num_written, strict=True)]
        return StreamNews(self.start.stream_id, self.start.epoch, gained, self.state)

    def was_written(self, news: StreamNews) -> None:
        """The journal has taken it."""
        self.num_written = [one.start + len(one.tokens) for one in news.choices]
        if news.state in (StreamState.CLOSED, StreamState.RELEASED):
            self.is_owned = False

    def write_all(self) -> None:
        """The journal has lost it."""
        self.num_written = [0] * len(self.logs)

    @property
    def server_timing(self) -> str:
        """See AdmittedAnswer."""
        return "" if self._answer is None else self._answer.server_timing

    async def _made(self, answer: Answer) -> None:
        try:
            async for choice, event in answer.numbered_events():
                self.events.append(choice, event)
        finally:
            answer.close()

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._tell_end()
        if task.cancelled():
            self.events.end(WorkerGroupError("The server is stopping."))
            return
        error = task.exception()
        if self.is_readable and error is None:
            self.state = StreamState.ENDED
        elif self.is_readable:
            self.state = StreamState.RELEASED if isinstance(error, _OF_THE_REPLICA) else StreamState.CLOSED
        self.events.end(error)


class StreamReader:
    """An AdmittedAnswer that reads a stream. Closing it leaves the stream.

    Args:
        stream: What is read.
        cursor: Events of each choice that the client has.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: LiveStream, cursor: list[int]) -> None:
        self._stream = stream
        self._cursor = cursor
        self._is_open = True

    def events(self) -> AsyncGenerator[bytes]:
        """See AdmittedAnswer."""
        return self._stream.events.read(self._cursor)

    @property
    def server_timing(self) -> str:
        """See AdmittedAnswer."""
        return self._stream.server_timing

    async def whole(self) -> dict[str, Any]:
        """A resumable answer is a stream."""
        raise AssertionError("resumable answers are streamed")

    def failure(self, content: Mapping[str, Any]) -> bytes | None:
        """See AdmittedAnswer."""
        return None

    def close(self) -> None:
        """The connection has ended; the stream goes on for a while."""
        if self._is_open:
            self._is_open = False
            self._stream.detach()
