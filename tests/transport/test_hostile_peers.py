"""Peers that do not know the secret, replay, change, flood or stay silent; the members connect and are served on."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import uvloop

from max_ray.errors import TransportError
from max_ray.transport import listener
from max_ray.transport.address import Endpoint, address_towards, bound_socket, tune
from max_ray.transport.blocking import MemberConnection
from max_ray.transport.codec import encode_number
from max_ray.transport.frames import HEADER, TO_WORKER, FrameReader, FrameWriter, MessageType
from max_ray.transport.handshake import WORKER, Credentials, Member, MemberHandshake, ReplicaHandshake
from tests.transport.peers import RANKS, is_closed_within, raw_socket, replica

PING, PONG = MessageType.PING, MessageType.PONG
NETWORKS: list[Any] = [
    pytest.param({}, id="unix"),
    pytest.param({"peer_address": "127.0.0.1"}, id="tcp"),
    pytest.param({"peer_address": "127.0.0.3", "port_range": (23451, 23499)}, id="ports"),
]


async def connect(endpoint: Endpoint, member: Member = RANKS[0]) -> MemberConnection:
    return await asyncio.to_thread(MemberConnection.connect, endpoint, member, TO_WORKER)


async def received(connection: MemberConnection) -> list[tuple[int, bytes]]:
    return await asyncio.to_thread(connection.receive, 5.0)


@pytest.mark.parametrize("network", NETWORKS)
async def test_members_connect_and_messages_travel(network: dict[str, Any]) -> None:
    async with replica(**network) as (seen, endpoint):
        members = [await connect(endpoint, member) for member in RANKS]
        await asyncio.wait_for(seen.admission.all_connected.wait(), 5)
        for number, (member, connection) in enumerate(zip(RANKS, members, strict=True)):
            seen.admission.connections[member].send(MessageType.INTERRUPT, encode_number(number))
            assert await received(connection) == [(MessageType.INTERRUPT, encode_number(number))]
            seen.admission.connections[member].send(PING, encode_number(9))
            assert await received(connection) == [], "pings are answered, and are nobody's message"
        while len(seen.messages) < 2:
            await asyncio.sleep(0.001)
        assert seen.messages == [(member, PONG, encode_number(9)) for member in RANKS]
        if endpoint.path is not None:
            assert stat.S_IMODE(os.stat(os.path.dirname(endpoint.path)).st_mode) == 0o700
        else:
            assert endpoint.host == "127.0.0.1"
            low, high = network.get("port_range", (1, 65535))
            assert low <= endpoint.port <= high
    assert endpoint.path is None or not os.path.exists(endpoint.path)
    await received(members[0])
    assert members[0].is_closed


async def test_a_large_message_travels_both_ways() -> None:
    payload = os.urandom(5_000_000)
    async with replica() as (seen, endpoint):
        connection = await connect(endpoint)
        await asyncio.to_thread(connection.send, MessageType.STEP, payload)
        while not seen.messages:
            await asyncio.sleep(0.001)
        assert seen.messages[0][2] == payload
        seen.admission.connections[RANKS[0]].send(MessageType.EXECUTE, payload)
        got: list[tuple[int, bytes]] = []
        while not got:
            got = await received(connection)
        assert got == [(MessageType.EXECUTE, payload)]


def test_secrets_are_never_printed() -> None:
    credentials = Credentials.new("group", 5)
    endpoint = Endpoint("/x", "", 0, credentials)
    text = f"{credentials!r} {endpoint!r} {endpoint}"
    assert credentials.secret.hex() not in text
    assert repr(credentials.secret)[2:-1] not in text
    assert Credentials.new("group", 5).secret != credentials.secret


@pytest.mark.parametrize(
    "changed",
    [
        {"secret": bytes(32)},
        {"epoch": 6},
        {"group_id": "other"},
    ],
)
async def test_another_secret_epoch_or_group(changed: dict[str, Any]) -> None:
    async with replica() as (seen, endpoint):
        values = {"group_id": "group", "epoch": 5, "secret": endpoint.credentials.secret, **changed}
        wrong = Endpoint(endpoint.path, "", 0, Credentials(**values))
        with pytest.raises(TransportError, match="handshake"):
            await connect(wrong)
        with pytest.raises(TransportError, match="handshake"):
            await connect(endpoint, Member(WORKER, 7))
        with pytest.raises(TransportError, match="handshake"):
            await connect(endpoint, Member("kv_manager", 0))
        assert not seen.admission.connections
        await connect(endpoint)
        with pytest.raises(TransportError, match="handshake"):
            await connect(endpoint)  # a second rank 0
        assert list(seen.admission.connections) == [RANKS[0]]


async def test_a_recorded_handshake_proves_nothing() -> None:
    async with replica() as (seen, endpoint):
        first = raw_socket(endpoint)
        handshake = MemberHandshake(endpoint.credentials, RANKS[0])
        recorded = handshake.answer(await asyncio.to_thread(first.recv, 32))
        first.close()
        again = raw_socket(endpoint)
        await asyncio.to_thread(again.recv, 32)
        again.sendall(recorded)
        assert await is_closed_within(again, 5)
        assert not seen.admission.connections


def test_a_replica_without_the_secret_is_refused() -> None:
    right, wrong = Credentials.new("group", 5), Credentials.new("group", 5)
    impostor = ReplicaHandshake(wrong, RANKS)
    member = MemberHandshake(right, RANKS[0])
    answer = member.answer(impostor.nonce)
    with pytest.raises(TransportError, match="secret"):
        impostor.feed(answer)
    with pytest.raises(TransportError, match="replica does not know"):
        member.finish(answer[32:])  # its own proof sent back


async def test_more_bytes_than_a_handshake_are_not_read() -> None:
    async with replica() as (_, endpoint):
        flood = raw_socket(endpoint)
        flood.sendall(bytes(65))
        assert await is_closed_within(flood, 5)


async def test_silent_and_half_open_peers_are_closed_and_members_are_served() -> None:
    started = time.monotonic()
    async with replica(peer_address="127.0.0.1") as (seen, endpoint):
        silent = [await asyncio.to_thread(raw_socket, endpoint) for _ in range(200)]
        for sock in silent[:100]:
            sock.sendall(bytes(40))
        connection = await connect(endpoint)
        seen.admission.connections[RANKS[0]].send(MessageType.INTERRUPT, encode_number(1))
        assert await received(connection) == [(MessageType.INTERRUPT, encode_number(1))]
        assert len(seen.admission.waiting) == 200
        while seen.admission.waiting:
            assert time.monotonic() - started < 30
            await asyncio.sleep(0.05)
        assert all([await is_closed_within(sock, 0.5) for sock in silent])
        seen.admission.connections[RANKS[0]].send(MessageType.INTERRUPT, encode_number(2))
        assert await received(connection) == [(MessageType.INTERRUPT, encode_number(2))]
        await connect(endpoint, RANKS[1])
    for sock in silent:
        sock.close()


async def test_too_many_waiting_peers_push_out_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_WAITING", 5)
    async with replica() as (seen, endpoint):
        peers = [raw_socket(endpoint) for _ in range(8)]
        await asyncio.to_thread(peers[-1].recv, 32)
        assert len(seen.admission.waiting) == 5
        assert await is_closed_within(peers[0], 2)
        await connect(endpoint)
    assert await is_closed_within(peers[-1], 2), "nobody may wait once the listener has gone"


async def test_a_silent_replica_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("max_ray.transport.blocking.TIMEOUT_S", 0.2)
    with bound_socket("127.0.0.1", None) as sock:
        endpoint = Endpoint(None, "127.0.0.1", sock.getsockname()[1], Credentials.new("group", 5))
        with pytest.raises(TransportError, match="timed out"):
            await connect(endpoint)
    with pytest.raises(TransportError, match=r"cannot reach its replica at 127\.0\.0\.1.*worker_port_range"):
        await connect(endpoint)


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="Worker 0 cannot reach its replica"):
        await connect(Endpoint(str(tmp_path / "socket"), "", 0, Credentials.new("group", 5)))


def test_addresses_and_ports() -> None:
    assert address_towards("127.0.0.9") == "127.0.0.1"
    with bound_socket("127.0.0.1", (23400, 23400)), pytest.raises(TransportError, match="23400 to 23400"):
        bound_socket("127.0.0.1", (23400, 23400))


def _frames(count: int) -> list[bytes]:
    writer = FrameWriter(bytes(32))
    return [writer.frame(PING, encode_number(i)) for i in range(count)]


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 500, 10_000])
def test_frames_cut_anywhere(size: int) -> None:
    data = b"".join(_frames(20))
    reader = FrameReader(bytes(32), [PING])
    got = [message for i in range(0, len(data), size) for message in reader.feed(data[i : i + size])]
    assert got == [(PING, encode_number(i)) for i in range(20)]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 0], "Frame 0 arrived in the place of frame 1"),
        ([1], "Frame 1 arrived in the place of frame 0"),
        ([0, 2], "Frame 2 arrived"),
    ],
)
def test_replayed_swapped_and_lost_frames(order: list[int], message: str) -> None:
    frames = _frames(3)
    reader = FrameReader(bytes(32), [PING])
    for number in order[:-1]:
        reader.feed(frames[number])
    with pytest.raises(TransportError, match=message):
        reader.feed(frames[order[-1]])


def test_frames_of_another_session_direction_or_type() -> None:
    (frame,) = _frames(1)
    with pytest.raises(TransportError, match="another session"):
        FrameReader(b"\1" * 32, [PING]).feed(frame)
    with pytest.raises(TransportError, match="may not send"):
        FrameReader(bytes(32), [PONG]).feed(frame)


def test_every_bit_of_a_frame_counts() -> None:
    (frame,) = _frames(1)
    for bit in range(8 * len(frame)):
        changed = bytearray(frame)
        changed[bit // 8] ^= 1 << bit % 8
        reader = FrameReader(bytes(32), list(MessageType))
        try:
            got = reader.feed(bytes(changed))
        except TransportError:
            continue
        assert got == [], f"bit {bit}"  # a longer length: the frame is not whole yet


@pytest.mark.parametrize("length", [9, 2**16, 2**31, 2**32 - 1])
def test_a_claimed_length_over_the_limit(length: int) -> None:
    header = HEADER.pack(b"mR", 1, PING, length, 0)
    with pytest.raises(TransportError, match="claims"):
        FrameReader(bytes(32), [PING]).feed(header)


def test_a_payload_over_the_limit_is_not_sent() -> None:
    with pytest.raises(TransportError, match="9 bytes"):
        FrameWriter(bytes(32)).frame(PING, bytes(9))


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_member_that_breaks_the_protocol_is_closed(new_event_loop: Any) -> None:
    async def run() -> None:
        async with replica() as (seen, endpoint):
            connection = await connect(endpoint)
            other = await connect(endpoint, RANKS[1])
            connection.send(PONG, encode_number(1))
            while not seen.messages:
                await asyncio.sleep(0.001)
            connection._sock.setblocking(True)
            connection._sock.sendall(bytes(40))
            assert await is_closed_within(connection._sock, 5)
            while not seen.closed:
                await asyncio.sleep(0.001)
            assert isinstance(seen.closed[0][1], TransportError)
            seen.admission.connections[RANKS[1]].send(MessageType.INTERRUPT, encode_number(3))
            assert await received(other) == [(MessageType.INTERRUPT, encode_number(3))]
            seen.admission.connections[RANKS[0]].send(PING, encode_number(3))  # to a closed one: nothing happens

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())


async def test_a_replica_that_breaks_the_protocol_is_closed() -> None:
    async with replica() as (seen, endpoint):
        connection = await connect(endpoint)
        seen.admission.connections[RANKS[0]]._transport.write(bytes(64))
        with pytest.raises(TransportError, match="does not begin"):
            await received(connection)
        assert connection.is_closed
        assert connection._sock.fileno() == -1


async def test_a_bare_socket_is_no_session() -> None:
    """After the handshake both directions have keys of their own: what one side sent cannot be sent back to it."""
    async with replica() as (seen, endpoint):
        connection = await connect(endpoint)
        frame = seen.admission.connections[RANKS[0]]._writer
        assert frame is not None
        reflected = frame.frame(PONG, encode_number(1))
        connection._sock.setblocking(True)
        connection._sock.sendall(reflected)
        assert await is_closed_within(connection._sock, 5)
        assert seen.messages == []


def test_sockets_have_no_delay() -> None:
    with bound_socket("127.0.0.1", None) as sock:
        peer = socket.create_connection(sock.getsockname())
        tune(peer)
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        peer.close()
