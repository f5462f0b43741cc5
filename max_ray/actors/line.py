"""The direct line between a replica and the workers of its group on one node: runs go out, steps come back.

A Ray call or a streamed Ray object costs about a millisecond of CPU on either side; a frame on a Unix socket costs a
twentieth of that, and a step may be shorter than a millisecond. Ray still starts, watches and ends the workers: each
sits in one actor call, `ModelWorker.serve`, for as long as the line is open, and that call's end tells of its death.

A frame is a length (4 bytes, little-endian) and a pickle; but a step's output with nothing but tokens, sent for every
step, has a layout of its own that costs a tenth of a pickle. The socket lies in a folder that only this user can enter,
and is removed as soon as all ranks have called.

    to a worker      RunRequest: a run; RunExtension: more steps for it; int: interrupt runs up to this id
    to the replica   int: the rank that calls; (run id, StepOutput): a step, from rank 0 only

The KV manager has a line of its own (`ledger_line`): (number, LeaseRequest) to it, (number, LeaseReply) back.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import shutil
import socket
import struct
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from max_ray.errors import WorkerGroupError
from max_ray.interfaces import RunExtension, StepOutput

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 16
_WAIT_S = 1.0  # between two looks at what is on its way
_PICKLE = pickle.HIGHEST_PROTOCOL
_STEP = struct.Struct("<BBxxIqI")  # 1 (no pickle begins so), last, step, run id, rows; int64 indptr, tokens follow
_IS_STEP = 1


def encode_frame(message: Any) -> bytes:
    data = pickle.dumps(message, _PICKLE)
    return _LENGTH.pack(len(data)) + data


def encode_step(run_id: int, output: StepOutput) -> bytes:
    """The frame of (run id, output)."""
    more = (output.log_probabilities, output.prompt_log_probabilities, output.embeddings, output.errors)
    if any(part is not None for part in more):
        return encode_frame((run_id, output))
    arrays = output.indptr.tobytes() + output.tokens.tobytes()
    header = _STEP.pack(_IS_STEP, output.last, output.step, run_id, len(output.indptr) - 1)
    return _LENGTH.pack(len(header) + len(arrays)) + header + arrays


def _decode(data: bytes) -> Any:
    if data[0] != _IS_STEP:
        return pickle.loads(data)
    _, last, step, run_id, num_rows = _STEP.unpack_from(data)
    arrays = np.frombuffer(data, dtype=np.int64, offset=_STEP.size)
    return run_id, StepOutput(step, arrays[num_rows + 1 :], arrays[: num_rows + 1], bool(last))


class FrameReader:
    """Takes bytes as they come and gives whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete with these bytes."""
        self._buffer += data
        messages: list[Any] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            end = start + _LENGTH.size + _LENGTH.unpack_from(self._buffer, start)[0]
            if end > len(self._buffer):
                break
            messages.append(_decode(bytes(self._buffer[start + _LENGTH.size : end])))
            start = end
        if start:
            del self._buffer[:start]
        return messages


@asynccontextmanager
async def listening(protocol: Callable[[], asyncio.Protocol]) -> AsyncIterator[str]:
    """The path of a socket in a folder that only this user can enter; each call makes a `protocol`. Afterwards nobody
    can call any more, and the calls that came stay."""
    folder = tempfile.mkdtemp(prefix="max_ray-")
    path = os.path.join(folder, "line")
    server = await asyncio.get_running_loop().create_unix_server(protocol, path)
    try:
        yield path
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


async def until_called(called: asyncio.Event, serving: Iterable[asyncio.Future[None]]) -> None:
    """Until all have called, or one of the actors' calls has ended."""
    waiting = asyncio.create_task(called.wait())
    try:
        either: list[asyncio.Future[Any]] = [waiting, *serving]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


class WorkerLine:
    """An actor's end: blocking, for one thread. `interrupt` is called with the id of each interrupt that arrives."""

    def __init__(self, sock: socket.socket, interrupt: Callable[[int], None] = lambda run_id: None) -> None:
        self._sock = sock
        self._interrupt = interrupt
        self._reader = FrameReader()
        self._orders: deque[Any] = deque()
        self._extensions: list[RunExtension] = []  # of the run that the replica sent last
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.is_closed = False

    @classmethod
    def call(
        cls, path: str, rank: int | None, interrupt: Callable[[int], None] = lambda run_id: None
    ) -> WorkerLine | None:
        """Calls the replica that listens at `path`, with the rank of a worker; None where nobody listens (the replica
        is on another node, or gone)."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            return None
        line = cls(sock, interrupt)
        if rank is not None:
            line.send(rank)
        return line

    def send(self, message: Any) -> None:
        """Sends; a replica that has hung up is found out by the next look at the line."""
        self._send(encode_frame(message))

    def send_step(self, run_id: int, output: StepOutput) -> None:
        """See `send`."""
        self._send(encode_step(run_id, output))

    def _send(self, frame: bytes) -> None:
        try:
            self._sock.sendall(frame)
        except OSError:
            self.is_closed = True

    def next_order(self, timeout_s: float) -> Any:
        """The next message that is no word about a run in progress; None when nothing came in time or the line is
        closed."""
        if not self._orders:
            self.look(timeout_s)
        return self._orders.popleft() if self._orders else None

    def look(self, timeout_s: float = 0.0) -> None:
        """Takes in what has arrived. Without a timeout it costs a microsecond: made for every step boundary."""
        if not self.is_closed and self._poll.poll(timeout_s * 1000):
            self._receive()

    def num_arrived(self, run_id: int) -> int:
        """See Extensions. Those of former runs came too late, and are dropped here."""
        if self._extensions and self._extensions[0].run_id < run_id:
            self._extensions = [extension for extension in self._extensions if extension.run_id >= run_id]
        return sum(extension.run_id == run_id for extension in self._extensions)

    def get(self, run_id: int, number: int) -> RunExtension:
        """See Extensions. Raises WorkerGroupError when the replica hangs up before it has told all ranks."""
        while self.num_arrived(run_id) < number:
            if self.is_closed:
                raise WorkerGroupError("The replica hung up while it extended a run.")
            self.look(_WAIT_S)
        return self._extensions[number - 1]

    def _receive(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except OSError:
            data = b""
        self.is_closed = not data
        for message in self._reader.feed(data):
            if isinstance(message, int):
                self._interrupt(message)
            elif isinstance(message, RunExtension):
                self._extensions.append(message)
            else:
                self._orders.append(message)

    def close(self) -> None:
        self.is_closed = True
        self._sock.close()
