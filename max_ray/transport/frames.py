"""Frames: a header, a payload, and a keyed digest of both.

    header    magic (2 bytes), version (1), type (1), payload length (4), counter (8); little-endian
    payload   at most the limit of its type
    digest    BLAKE2b-128 of header and payload, with the key of this direction of this session

Each direction counts its frames from 0. So a frame that is changed, repeated, left out, reordered or from another
session is found, and the reader raises TransportError: the connection must be closed then. A reader keeps only bytes
that have arrived, whatever length a header claims.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Collection
from enum import IntEnum
from hashlib import blake2b

from max_ray.errors import TransportError

MAGIC = b"mR"
VERSION = 1
DIGEST_BYTES = 16
HEADER = struct.Struct("<2sBBIQ")
READ_BYTES = 1 << 18
_MIB = 1 << 20


class MessageType(IntEnum):
    """What a frame carries; see `codec`."""

    EXECUTE = 1
    EXTEND = 2
    INTERRUPT = 3
    STEP = 4
    CACHE_UPDATE = 5
    CACHE_REPLY = 6
    ERROR = 7
    PING = 8
    PONG = 9


MAX_PAYLOAD: dict[MessageType, int] = {
    MessageType.EXECUTE: 2048 * _MIB - 1,  # images of a batch travel in it
    MessageType.EXTEND: 256 * _MIB,
    MessageType.INTERRUPT: 8,
    MessageType.STEP: 1024 * _MIB,  # log probabilities of whole prompts, vectors of embeddings
    MessageType.CACHE_UPDATE: 256 * _MIB,
    MessageType.CACHE_REPLY: 256 * _MIB,
    MessageType.ERROR: 64 * 1024,
    MessageType.PING: 8,
    MessageType.PONG: 8,
}
"""Most bytes of a payload, by type."""

TO_WORKER = frozenset({MessageType.EXECUTE, MessageType.EXTEND, MessageType.INTERRUPT, MessageType.PING})
FROM_WORKER = frozenset({MessageType.STEP, MessageType.ERROR, MessageType.PONG})
TO_KV_MANAGER = frozenset({MessageType.CACHE_UPDATE, MessageType.PING})
FROM_KV_MANAGER = frozenset({MessageType.CACHE_REPLY, MessageType.ERROR, MessageType.PONG})

_LIMITS = {int(kind): limit for kind, limit in MAX_PAYLOAD.items()}


class FrameWriter:
    """Makes the frames of one direction.

    Args:
        key: 32 bytes, of this direction of this session.
    """

    __slots__ = ("_counter", "_keyed")

    def __init__(self, key: bytes) -> None:
        self._keyed = blake2b(key=key, digest_size=DIGEST_BYTES)
        self._counter = 0

    def frame(self, kind: int, payload: bytes) -> bytes:
        """The next frame. Raises TransportError for a payload over the limit of its type."""
        if len(payload) > _LIMITS[kind]:
            raise TransportError(
                f"A {MessageType(kind).name} message has {len(payload)} bytes, {_LIMITS[kind]} are allowed: "
                "lower max_batch_input_tokens, max_batch_size or the size of images."
            )
        header = HEADER.pack(MAGIC, VERSION, kind, len(payload), self._counter)
        self._counter += 1
        digest = self._keyed.copy()
        digest.update(header)
        digest.update(payload)
        return b"".join((header, payload, digest.digest()))


class FrameReader:
    """Takes bytes as they come and gives whole, verified messages.

    Args:
        key: 32 bytes, of this direction of this session.
        accepts: Types that the other side may send.
    """

    __slots__ = ("_accepts", "_buffer", "_counter", "_keyed")

    def __init__(self, key: bytes, accepts: Collection[MessageType]) -> None:
        self._keyed = blake2b(key=key, digest_size=DIGEST_BYTES)
        self._accepts = frozenset(map(int, accepts))
        self._counter = 0
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """(type, payload) of the frames that are complete with `data`. Raises TransportError for a wrong one."""
        self._buffer += data
        messages: list[tuple[int, bytes]] = []
        start, available = 0, len(self._buffer)
        while available - start >= HEADER.size:
            kind, length = self._checked_header(start)
            end = start + HEADER.size + length + DIGEST_BYTES
            if end > available:
                break
            messages.append((kind, self._verified(start, length)))
            start = end
        if start == available:
            self._buffer = bytearray()
        elif start:
            del self._buffer[:start]
        return messages

    def _checked_header(self, start: int) -> tuple[int, int]:
        magic, version, kind, length, counter = HEADER.unpack_from(self._buffer, start)
        if magic != MAGIC or version != VERSION:
            raise TransportError("A frame does not begin as version 1 of this protocol does.")
        if kind not in self._accepts:
            raise TransportError(f"A frame has type {kind}, which its sender may not send.")
        if length > _LIMITS[kind]:
            raise TransportError(f"A frame claims {length} bytes, {_LIMITS[kind]} are allowed for its type.")
        if counter != self._counter:
            raise TransportError(f"Frame {counter} arrived in the place of frame {self._counter}.")
        return kind, length

    def _verified(self, start: int, length: int) -> bytes:
        body = start + HEADER.size
        with memoryview(self._buffer) as view:
            digest = self._keyed.copy()
            digest.update(view[start : body + length])
            is_genuine = hmac.compare_digest(digest.digest(), view[body + length : body + length + DIGEST_BYTES])
            payload = bytes(view[body : body + length]) if is_genuine else b""
        if not is_genuine:
            raise TransportError(f"Frame {self._counter} was changed on its way, or is from another session.")
        self._counter += 1
        return payload
