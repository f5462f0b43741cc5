"""`max-ray run`: a server of the model is used, another is refused, none is started and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from max_ray.cli import main as cli
from max_ray.cli.chat import command
from max_ray.cli.chat.client import Client, ServerError
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.cli.servers import serving
from tests.http.fake_engine import FakeEngine
from tests.source_tree import ROOT
from tests.transport.test_tls import make_files

FAKE = (sys.executable, "-m", "tests.cli.fake_serve")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    return write_byte_level(tmp_path / "tiny")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_of_the_model_is_used(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(TextTokenizer(model, max_length=200), lambda context: "hello")
    engine.model_name = "tiny"
    with serving(engine) as server:
        assert cli.main(["run", "--port", str(server.port), "--system", "Be brief.", str(model), "hi"]) == 0
        assert capsys.readouterr().out.startswith("hello\n[")
        assert is_open(server.port), "it was there before"
        engine.model_name = "other"
        assert cli.main(["run", "--port", str(server.port), str(model), "hi"]) == 2
        said = capsys.readouterr().err
        assert "has a server of other." in said
        assert f"max-ray chat --url {server.url}" in said
    assert len(engine.contexts) == 1


def test_a_server_with_a_certificate_of_its_own(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine = FakeEngine(TextTokenizer(model, max_length=200), lambda context: "hello")
    engine.model_name = "tiny"
    files = make_files(tmp_path / "tls")
    foreign = make_files(tmp_path / "foreign")
    chain = tmp_path / "chain.crt"
    chain.write_text(Path(files.certificate).read_text() + Path(files.ca_certificate).read_text())
    with serving(engine, ssl_certfile=str(chain), ssl_keyfile=files.key) as server:
        flags = ["--port", str(server.port), "--ssl-keyfile", files.key, "--ssl-certfile"]
        assert cli.main(["run", *flags, str(chain), str(model), "hi"]) == 0
        assert capsys.readouterr().out.startswith("hello\n[")
        with pytest.raises(ServerError, match="certificate"):
            Client(server.url, ca_file=foreign.ca_certificate).models()
        with pytest.raises(ServerError, match="certificate"):
            Client(server.url).models()


def test_without_a_server_one_is_started_with_the_same_settings_and_ended(
    model: Path, port: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_SERVE", FAKE)
    monkeypatch.chdir(ROOT)
    flags = ["--port", str(port), "--max-length", "100", "--no-enable-prefix-caching", "--custom-architectures", "a"]
    assert cli.main(["run", *flags, "--custom-architectures", "b", str(model), "hi"]) == 0
    assert capfd.readouterr().out.startswith("hello\n[")
    assert not is_open(port)
    given = (model / "started").read_text().split("\n")
    for pair in (["--max-length", "100"], ["--custom-architectures", "a"], ["--custom-architectures", "b"]):
        assert any(given[i : i + 2] == pair for i in range(len(given)))
    assert "--no-enable-prefix-caching" in given
    assert cli._parse(["serve", *given])["max_length"] == "100", "the flags are those of serve"


def test_a_server_that_does_not_start_is_a_sentence(
    model: Path, port: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_SERVE", (sys.executable, "-c", "import sys; sys.exit('no memory')"))
    assert cli.main(["run", "--port", str(port), str(model), "hi"]) == 2
    assert capfd.readouterr().err == "no memory\nmax-ray: error: The server did not start.\n"


def test_the_server_ends_when_run_is_killed(model: Path, port: int) -> None:
    code = (
        "import sys; from max_ray.cli import main; from max_ray.cli.chat import command\n"
        f"command._SERVE = {FAKE!r}\nmain.main(['run', '--port', '{port}', {str(model)!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while not is_open(port) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    while is_open(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_open(port)
