"""TCP connections with Ray's TLS files: both sides show a certificate of one authority."""

from __future__ import annotations

import asyncio
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from max_ray import settings
from max_ray.errors import ConfigError, TransportError
from max_ray.transport.address import TlsFiles
from max_ray.transport.blocking import MemberConnection
from max_ray.transport.codec import encode_number
from max_ray.transport.frames import TO_WORKER, MessageType
from tests.transport.peers import RANKS, is_closed_within, raw_socket, replica


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def make_files(folder: Path) -> TlsFiles:
    """An authority, and a certificate of it."""
    folder.mkdir()
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(folder, "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=authority")
    openssl(folder, "req", *key, "-keyout", "node.key", "-out", "node.csr", "-subj", "/CN=node")
    signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial")
    openssl(folder, "x509", "-req", "-in", "node.csr", *signing, "-out", "node.crt", "-days", "2")
    return TlsFiles(*(str(folder / name) for name in ("node.crt", "node.key", "ca.crt")))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_files(tmp_path_factory.mktemp("tls") / "ours")


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_messages_travel(files: TlsFiles, new_event_loop: Any) -> None:
    payload = bytes(range(256)) * 8000

    async def run() -> None:
        async with replica(peer_address="127.0.0.1", tls=files) as (seen, endpoint):
            assert endpoint.uses_tls
            connection = await asyncio.to_thread(MemberConnection.connect, endpoint, RANKS[0], TO_WORKER, files)
            assert connection.receive() == [], "a look does not wait, though TLS has records of its own"
            await asyncio.to_thread(connection.send, MessageType.STEP, payload)
            while not seen.messages:
                await asyncio.sleep(0.001)
            assert seen.messages[0][2] == payload
            member = seen.admission.connections[RANKS[0]]
            member.send(MessageType.EXECUTE, payload)
            member.send(MessageType.INTERRUPT, encode_number(3))
            got: list[tuple[int, bytes]] = []
            while len(got) < 2:
                got += await asyncio.to_thread(connection.receive, 1.0)
            assert got == [(MessageType.EXECUTE, payload), (MessageType.INTERRUPT, encode_number(3))]
            connection.close()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())


async def test_peers_without_a_certificate_of_the_authority(files: TlsFiles, tmp_path: Path) -> None:
    foreign = make_files(tmp_path / "foreign")
    async with replica(peer_address="127.0.0.1", tls=files) as (seen, endpoint):
        for tls in (foreign, replace(foreign, ca_certificate=files.ca_certificate)):
            with pytest.raises(TransportError):
                await asyncio.to_thread(MemberConnection.connect, endpoint, RANKS[0], TO_WORKER, tls)
        with pytest.raises(TransportError, match="RAY_USE_TLS"):
            await asyncio.to_thread(MemberConnection.connect, endpoint, RANKS[0], TO_WORKER, None)
        silent, plain = raw_socket(endpoint), raw_socket(endpoint)
        plain.sendall(bytes(64))
        assert await is_closed_within(plain, 6)
        assert await is_closed_within(silent, 7), "no TLS handshake within 5 s"
        assert not seen.admission.connections


def test_the_files_are_rays_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
        monkeypatch.delenv(name, raising=False)
    assert settings.ray_tls_paths() is None
    monkeypatch.setenv("RAY_USE_TLS", "0")
    assert settings.ray_tls_paths() is None
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with pytest.raises(ConfigError, match="RAY_TLS_SERVER_CERT names no file"):
        settings.ray_tls_paths()
    for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT"):
        monkeypatch.setenv(f"RAY_TLS_{name}", f"/{name}")
    assert settings.ray_tls_paths() == ("/SERVER_CERT", "/SERVER_KEY", "/CA_CERT")
