"""`max-ray status` against the real routes over a fake engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from max_ray.cli import main as cli
from max_ray.cli.chat.client import Client
from max_ray.cli.status import status_text
from max_ray.interfaces import RequestID
from max_ray.scheduler import RequestActivity
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.cli.servers import Server, serving
from tests.http.fake_engine import FakeEngine


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    made = FakeEngine(TextTokenizer(write_byte_level(tmp_path), max_length=200), lambda context: "hello")
    table = np.arange(3, dtype=np.int32)
    made.listed = tuple(
        RequestActivity(RequestID(), phase, 2.5, 100, 16, 60, 5, table)  # type: ignore[arg-type]
        for phase in ["decode", "prefill", *["queued"] * 30]
    )
    return made


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Server]:
    with serving(engine) as server:
        yield server


def test_the_table(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--url", server.url, "hi"]) == 0
    capsys.readouterr()
    assert cli.main(["status", "--url", server.url, "--once"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("fake  (text_generation, up to 200 tokens)  max-ray ")
    assert "\nrequests    3 running, 2 waiting, 0 finished, 0 failed, 0 refused\n" in text
    assert "\nKV cache    5 of 128 blocks (4%)\n" in text
    assert "\nlatency     first token p50 " in text
    rows = [line.split() for line in text.splitlines()]
    assert ["r0", "healthy", "3", "2", "5/64", "-"] in rows
    assert [row[1:] for row in rows if "decode" in row] == [["decode", "2.5", "s", "100", "16", "5", "3"]]
    assert text.endswith("and 12 more\n")
    assert max(map(len, text.splitlines())) < 100


def test_json(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--url", server.url, "--once", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["object"], found["model"]["id"], found["num_requests"]) == ("server", "fake", 32)


def test_tokens_a_second_come_from_two_looks(server: Server) -> None:
    before = Client(server.url).get("/v1/server")
    assert "tokens/s" not in status_text(before)
    now = json.loads(json.dumps(before)) | {"time": before["time"] + 2}
    now["replicas"][0]["generated_tokens"] += 21
    assert ", 10.5 tokens/s" in status_text(now, before)


class Other(BaseHTTPRequestHandler):
    """A server that answers everything with an empty object, or 404 below /v1."""

    def do_GET(self) -> None:
        self.send_response(404 if self.path.startswith("/v1") and self.server.server_port % 2 else 200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None: ...


def test_servers_of_others_and_none(capsys: pytest.CaptureFixture[str]) -> None:
    with HTTPServer(("127.0.0.1", 0), Other) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        assert cli.main(["status", "--url", f"127.0.0.1:{other.server_port}", "--once"]) == 2
        other.shutdown()
    assert "is no server of max-ray: it has no /v1/server." in capsys.readouterr().err
    assert cli.main(["status", "--url", "http://127.0.0.1:1", "--once"]) == 2
    assert "does not answer" in capsys.readouterr().err
