"""The handshake: both sides prove that they know the secret of this epoch, and derive the keys of the session.

    replica   sends 32 random bytes as soon as a peer has connected
    member    sends 32 random bytes and its proof
    replica   compares the proof with that of every member it waits for; sends its own proof

A proof is HMAC-SHA256(secret, protocol version, who proves, role, rank, group, epoch, both nonces), compared in
constant time. The replica reads 64 bytes at most before it has checked the proof. What was recorded of one handshake
proves nothing in another one, as both nonces are new. The secret itself never travels over the connection: Ray hands it
to the members with the call that asks them to connect.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from max_ray.errors import TransportError
from max_ray.transport.frames import VERSION

NONCE_BYTES = 32
PROOF_BYTES = 32
TIMEOUT_S = 5.0
"""A peer that has not proved itself by then is disconnected."""
WORKER, KV_MANAGER = "worker", "kv_manager"

_TEXT = struct.Struct("<I")
_NUMBERS = struct.Struct("<HiQ")


@dataclass(frozen=True)
class Member:
    """Who connects: a worker with its rank, or the KV manager (rank 0)."""

    role: str
    rank: int


@dataclass(frozen=True)
class Credentials:
    """What both sides know before they connect.

    Args:
        secret: 32 random bytes, new for each epoch; never printed.
        group_id: The worker group.
        epoch: The owner's epoch of the group.
    """

    group_id: str
    epoch: int
    secret: bytes = field(repr=False)

    @classmethod
    def new(cls, group_id: str, epoch: int) -> Credentials:
        return cls(group_id, epoch, secrets.token_bytes(32))


@dataclass(frozen=True)
class SessionKeys:
    """One key a direction."""

    to_member: bytes = field(repr=False)
    to_replica: bytes = field(repr=False)


class ReplicaHandshake:
    """The replica's side of one handshake, without any input or output of its own.

    Args:
        credentials: Of the present epoch.
        expected: The members that may connect.
    """

    def __init__(self, credentials: Credentials, expected: Iterable[Member]) -> None:
        self._credentials = credentials
        self._expected = tuple(expected)
        self._received = bytearray()
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def feed(self, data: bytes) -> tuple[Member, SessionKeys, bytes] | None:
        """The member, the session's keys and the replica's own proof, once the member has proved itself; None while
        bytes are missing. Raises TransportError for a wrong proof, and for more bytes than belong to it."""
        if len(self._received) + len(data) > NONCE_BYTES + PROOF_BYTES:
            raise TransportError("A peer sent more than a handshake before it had proved itself.")
        self._received += data
        if len(self._received) < NONCE_BYTES + PROOF_BYTES:
            return None
        nonce, proof = bytes(self._received[:NONCE_BYTES]), bytes(self._received[NONCE_BYTES:])
        found: Member | None = None
        for member in self._expected:  # all of them, so that the time says nothing
            transcript = _transcript(self._credentials, member, self.nonce, nonce)
            if hmac.compare_digest(_proof(self._credentials, b"member", transcript), proof):
                found = member
        if found is None:
            raise TransportError("A peer does not know the secret of this epoch.")
        transcript = _transcript(self._credentials, found, self.nonce, nonce)
        return found, _session_keys(self._credentials, transcript), _proof(self._credentials, b"replica", transcript)


class MemberHandshake:
    """A member's side of one handshake, without any input or output of its own."""

    def __init__(self, credentials: Credentials, member: Member) -> None:
        self._credentials = credentials
        self._member = member
        self._transcript = b""

    def answer(self, replica_nonce: bytes) -> bytes:
        """What to send after the replica's 32 bytes."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._transcript = _transcript(self._credentials, self._member, replica_nonce, nonce)
        return nonce + _proof(self._credentials, b"member", self._transcript)

    def finish(self, replica_proof: bytes) -> SessionKeys:
        """The session's keys. Raises TransportError when the replica does not know the secret."""
        if not hmac.compare_digest(_proof(self._credentials, b"replica", self._transcript), replica_proof):
            raise TransportError("The replica does not know the secret of this epoch.")
        return _session_keys(self._credentials, self._transcript)


def _transcript(credentials: Credentials, member: Member, replica_nonce: bytes, member_nonce: bytes) -> bytes:
    parts = [_NUMBERS.pack(VERSION, member.rank, credentials.epoch)]
    for text in (member.role.encode(), credentials.group_id.encode(), replica_nonce, member_nonce):
        parts += [_TEXT.pack(len(text)), text]
    return b"".join(parts)


def _proof(credentials: Credentials, prover: bytes, transcript: bytes) -> bytes:
    return hmac.digest(credentials.secret, b"max_ray proof of " + prover + b"\0" + transcript, sha256)


def _session_keys(credentials: Credentials, transcript: bytes) -> SessionKeys:
    def key(direction: bytes) -> bytes:
        return hmac.digest(credentials.secret, b"max_ray key to " + direction + b"\0" + transcript, sha256)

    return SessionKeys(key(b"member"), key(b"replica"))
