"""Every error a user of max_ray can meet, in one tree; each class knows the HTTP status it becomes.

    MaxRayError (500)
    |- InputError (400)                a request that cannot be served as it stands; also a ValueError
    |  |- PromptTooLongError
    |  |  `- InputTooLongError       the same for a text to embed
    |  |- StructuredOutputError       a grammar that cannot be enforced, found out while the text is generated
    |  |- NotFoundError (404)           nothing is kept under this id
    |  `- ModelNotServedError (404)
    |- ConfigError                     a setting, path or model that cannot work; also a ValueError
    |  |- ModelPathError               no such path, no config.json, nothing to load
    |  |- ArchitectureNotFoundError    no registered family has this name
    |  |- EncodingNotSupportedError
    |  |- ParallelismError             tensor_parallel_size does not fit the heads or the cluster
    |  `- DoesNotFitError              the memory plan is larger than the machine; says what fits
    |- WeightsError                    a checkpoint that does not match its network
    |- ConformanceError                a model family computes something else than its reference
    |- DeviceError                     no such device on this machine
    |- InsufficientBlocksError (503)   the KV cache has no room for this request
    |- ForbiddenError (403)            the API key may not do this
    |- QueueFullError (429)            the bounded queue is full; carries `retry_after` seconds
    |- WorkerGroupError (503)          a worker of the tensor-parallel group died or hangs
    |  `- TransportError                a connection to it cannot be made, or a peer breaks the protocol
    |- ServerFailedError               Ray did not start, or the server ended by itself; exit code 1
    |- ServerStoppingError (503)       the replica ends, as in an update or at the end of the server
    `- StaleLeaseError                 a call from a replica whose lease has passed to another

A message says what is wrong and what to do about it. Bugs of ours are plain assertions, not these.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_QUOTED = 64
_MAX_COMPARED = 256
_SEPARATORS = str.maketrans("", "", "-_. ")


class MaxRayError(Exception):
    """Base of all errors that max_ray raises on purpose."""

    http_status: int = 500
    error_type: str = "internal_error"


class InputError(MaxRayError, ValueError):
    """The request is at fault. `param` names the offending field where there is one."""

    http_status = 400
    error_type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(InputError):
    """`at_least`: only the beginning of the prompt was counted, and that is too long already."""

    def __init__(self, num_tokens: int, max_length: int, *, at_least: bool = False) -> None:
        super().__init__(
            f"The prompt has {'at least ' if at_least else ''}{num_tokens} tokens, but this model is served with "
            f"max_length={max_length} and at least one token must be left to generate. Shorten the prompt or serve "
            f"with a larger --max-length.",
            param="prompt",
        )
        self.num_tokens = num_tokens
        self.max_length = max_length
        self.at_least = at_least

    def __reduce__(self) -> tuple[object, ...]:  # its arguments are not its message: the default pickle fails
        return (type(self), (self.num_tokens, self.max_length), {**self.__dict__, "args": self.args})


class InputTooLongError(PromptTooLongError):
    """A text to embed that exceeds the model's length."""

    def __init__(self, num_tokens: int, max_length: int, *, at_least: bool = False) -> None:
        InputError.__init__(
            self,
            f"The input has {'at least ' if at_least else ''}{num_tokens} tokens, but this model embeds {max_length} "
            f"at most. Shorten it, split it, or have its end cut off (truncate).",
            param="input",
        )
        self.num_tokens = num_tokens
        self.max_length = max_length
        self.at_least = at_least


class StructuredOutputError(InputError):
    """A request's grammar cannot be enforced: it exceeds its limits, or no token of the vocabulary fits it."""


class NotFoundError(InputError):
    """What is asked for by its id is not kept, or belongs to another API key."""

    http_status = 404


class ModelNotServedError(InputError):
    http_status = 404


class ConfigError(MaxRayError, ValueError):
    """A setting cannot work. Raised before anything is loaded."""


class ModelPathError(ConfigError):
    pass


class ArchitectureNotFoundError(ConfigError):
    pass


class EncodingNotSupportedError(ConfigError):
    pass


class ParallelismError(ConfigError):
    pass


class DoesNotFitError(ConfigError):
    pass


class WeightsError(MaxRayError):
    """The checkpoint and the network do not match: the message names the tensors."""


class ConformanceError(MaxRayError):
    """A model family computes something else than its reference."""


class DeviceError(MaxRayError, RuntimeError):
    pass


class InsufficientBlocksError(MaxRayError, RuntimeError):
    http_status = 503
    error_type = "insufficient_kv_cache"


class ForbiddenError(MaxRayError):
    """The API key may not do this."""

    http_status = 403
    error_type = "permission_denied"


class QueueFullError(MaxRayError):
    http_status = 429
    error_type = "queue_full"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments do not survive the default pickle
        return (_queue_full, (str(self), self.retry_after))


def _queue_full(message: str, retry_after: float) -> QueueFullError:
    return QueueFullError(message, retry_after=retry_after)


class WorkerGroupError(MaxRayError, RuntimeError):
    http_status = 503
    error_type = "workers_unavailable"


class TransportError(WorkerGroupError):
    """A member of the group cannot be reached, or what a peer sent is not what the protocol allows."""


class ServerFailedError(MaxRayError, RuntimeError):
    """No mistake of the user's: to start the server again may help."""


class ServerStoppingError(MaxRayError):
    http_status = 503
    error_type = "replica_unavailable"


class StaleLeaseError(MaxRayError, RuntimeError):
    pass


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name of which `name` is a misspelling, or an empty string.

    A misspelling differs in upper and lower case or in `-`, `_` and `.`, or by one slip (a letter too many, missing,
    wrong, or two swapped) in 3 letters or more, two in 8 or more. What is farther away is another name: naming it would
    lead astray. `known`: names of the same kind only.
    """
    limit = 2 if len(name) >= 8 else int(len(name) >= 3)
    best = None
    for other in known:
        distance = 0 if _letters(name) == _letters(other) else _num_slips(name, other, limit)
        if distance <= limit:
            best, limit = other, distance - 1
    return f" Did you mean {best!r}?" if best is not None else ""


def quoted(name: str) -> str:
    """A name that came from outside, for a message: in quotes, in ASCII, and at most 64 characters of it."""
    return ascii(name if len(name) <= MAX_QUOTED else f"{name[:MAX_QUOTED]}...")


def _letters(name: str) -> str:
    return name.lower().translate(_SEPARATORS) if len(name) <= MAX_QUOTED else name


def _num_slips(first: str, second: str, limit: int) -> int:
    """Edits from one to the other (optimal string alignment), or `limit` + 1 where there are more."""
    if abs(len(first) - len(second)) > limit or len(first) > _MAX_COMPARED:
        return limit + 1
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        before, above, row = row, before, [i]
        for j, other in enumerate(second, start=1):
            distance = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and other == first[i - 2]:
                distance = min(distance, above[j - 2] + 1)
            row.append(distance)
        if min(row) > limit:
            return limit + 1
    return row[-1]
