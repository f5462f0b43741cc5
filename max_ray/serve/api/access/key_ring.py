"""KeyRing: the API keys that are valid now, from the environment and from a file that may change while it is read.

Keys are kept as SHA-256. A key is looked up by a keyed digest (HMAC with a secret of this process), which no client can
foresee: so the time of a look-up tells nothing about the keys, however many there are.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from max_ray.errors import ConfigError
from max_ray.log import get_logger
from max_ray.serve.api.access.caller import Caller
from max_ray.serve.api.access.key_file import KeyEntry, key_hash, read_key_file
from max_ray.serve.api.access.rate_limits import KeyUsage

_LOG = get_logger(__name__)
LOOK_EVERY_S = 1.0
_State = tuple[int, int, int, int] | None


class KeyRing:
    """Finds the caller of a key.

    Args:
        keys: Keys from the environment, in clear. Each has no limits, and a name made of its hash.
        path: The file of keys; None: there is none.
        clock: Seconds, monotonic.

    Raises:
        ConfigError: The file is wrong.
    """

    def __init__(
        self, keys: Sequence[str], path: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._secret = secrets.token_bytes(32)
        self._own = tuple(_entry_of(key) for key in keys)
        self._path = path
        self._clock = clock
        self._usage: dict[str, KeyUsage] = {}
        self._callers: dict[bytes, Caller] = {}
        self._lock = asyncio.Lock()
        self._looked_at = clock()
        self._state = _state_of(path)
        self._take(read_key_file(path) if path is not None else ())
        self._warn_of_mode()

    async def refresh(self) -> None:
        """Reads the file again if it has changed. A file that is wrong changes nothing, and is logged."""
        if self._path is None or self._clock() - self._looked_at < LOOK_EVERY_S:
            return
        async with self._lock:
            self._looked_at = self._clock()
            state = _state_of(self._path)
            if state == self._state:
                return
            self._state = state
            try:
                entries = await asyncio.to_thread(read_key_file, self._path)
            except ConfigError as error:
                _LOG.error("%s The keys stay as they were.", error)
                return
            self._take(entries)
            self._warn_of_mode()
            _LOG.info("The file of API keys was read again: %d keys.", len(entries))

    def find(self, key: bytes) -> Caller | None:
        """The caller that has this key."""
        return self._callers.get(self._digest(key_hash(key)))

    def _take(self, entries: Sequence[KeyEntry]) -> None:
        callers = {}
        for entry in (*self._own, *entries):
            usage = self._usage.setdefault(entry.name, KeyUsage())
            usage.limits = entry.limits
            models = None if entry.models is None else frozenset(entry.models)
            callers[self._digest(entry.sha256.lower())] = Caller(entry.name, models, entry.weight, entry.admin, usage)
        self._callers = callers

    def _digest(self, hashed: str) -> bytes:
        return hmac.digest(self._secret, hashed.encode(), "sha256")

    def _warn_of_mode(self) -> None:
        if self._state is not None and self._state[3] & (stat.S_IRWXG | stat.S_IRWXO):
            _LOG.warning("Other users may open the file of API keys %s: make its mode 0600.", self._path)


def _entry_of(key: str) -> KeyEntry:
    hashed = key_hash(key.strip().encode())
    return KeyEntry(name=f"key-{hashed[:8]}", sha256=hashed)


def _state_of(path: Path | None) -> _State:
    """What changes when the file does; None where there is no file."""
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode
