"""WorkerConnection: a worker's connection to its replica: runs come in, steps go out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from max_ray.errors import TransportError, WorkerGroupError
from max_ray.interfaces import RunExtension, RunRequest, StepOutput
from max_ray.transport.address import Endpoint, TlsFiles
from max_ray.transport.blocking import MemberConnection
from max_ray.transport.codec import decode_extension, decode_number, encode_error, encode_step
from max_ray.transport.frames import TO_WORKER, MessageType
from max_ray.transport.handshake import WORKER, Member
from max_ray.transport.run_codec import decode_run

_WAIT_S = 1.0  # between two looks at what is on its way


class WorkerConnection:
    """One rank's end, for one thread; the source of extensions for its runs (see Extensions).

    Args:
        connection: Open.
        interrupt: Called with the id of each interrupt that arrives.
    """

    def __init__(self, connection: MemberConnection, interrupt: Callable[[int], None]) -> None:
        self._connection = connection
        self._interrupt = interrupt
        self._runs: deque[RunRequest] = deque()
        self._extensions: list[RunExtension] = []  # of the run that the replica sent last

    @classmethod
    def connect(
        cls, endpoint: Endpoint, rank: int, interrupt: Callable[[int], None], tls: TlsFiles | None = None
    ) -> WorkerConnection:
        """See MemberConnection.connect."""
        return cls(MemberConnection.connect(endpoint, Member(WORKER, rank), TO_WORKER, tls), interrupt)

    @property
    def is_closed(self) -> bool:
        """Whether the replica, or this side, has closed."""
        return self._connection.is_closed

    def next_run(self, timeout_s: float) -> RunRequest | None:
        """The next run; None when none came in time or the connection is closed. Raises TransportError."""
        if not self._runs:
            self.look(timeout_s)
        return self._runs.popleft() if self._runs else None

    def look(self, timeout_s: float = 0.0) -> None:
        """Takes in what has arrived. Without a timeout it costs a microsecond: made for every step boundary."""
        for kind, payload in self._connection.receive(timeout_s):
            self._take(kind, payload)

    def send_step(self, run_id: int, output: StepOutput) -> None:
        """Sends what one step gave; see MemberConnection.send."""
        self._connection.send(MessageType.STEP, encode_step(run_id, output))

    def send_error(self, error: BaseException) -> None:
        """Tells the replica why this worker ends its work."""
        self._connection.send(MessageType.ERROR, encode_error(error))

    def num_arrived(self, run_id: int) -> int:
        """See Extensions. Those of former runs came too late, and are dropped here."""
        if self._extensions and self._extensions[0].run_id < run_id:
            self._extensions = [extension for extension in self._extensions if extension.run_id >= run_id]
        return sum(extension.run_id == run_id for extension in self._extensions)

    def get(self, run_id: int, number: int) -> RunExtension:
        """See Extensions. Raises WorkerGroupError when the replica closes before it has told all ranks."""
        while self.num_arrived(run_id) < number:
            if self.is_closed:
                raise WorkerGroupError("The replica closed the connection while it extended a run.")
            self.look(_WAIT_S)
        return self._extensions[number - 1]

    def close(self) -> None:
        """Closes; idempotent."""
        self._connection.close()

    def _take(self, kind: int, payload: bytes) -> None:
        try:
            if kind == MessageType.INTERRUPT:
                self._interrupt(decode_number(payload))
            elif kind == MessageType.EXTEND:
                self._extensions.append(decode_extension(payload))
            else:
                self._runs.append(decode_run(payload))
        except TransportError:
            self.close()
            raise
