"""`max-ray benchmark` through the command line: a run from flags to files, and what is refused before one."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from max_ray.benchmark.plot import panels, shown
from max_ray.benchmark.progress import Progress
from max_ray.cli import main as cli
from max_ray.serve.serve_config import DEMO_MODEL
from tests.benchmark.sse_server import Answer, ScriptedServer, scripted_server

LOAD = ("--max-concurrency", "4")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A scripted server on a loop of its own, for a command line that has one too."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    manager = scripted_server(lambda body: Answer(texts=["x"] * body["max_tokens"]))
    try:
        yield asyncio.run_coroutine_threadsafe(manager.__aenter__(), loop).result()
        asyncio.run_coroutine_threadsafe(manager.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def serving(server: ScriptedServer, *arguments: str) -> int:
    return cli.main(["benchmark", "serving", "--base-url", server.url, *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["benchmark", *arguments]) == 2
    return capsys.readouterr().err


def test_from_flags_to_table_and_file(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_KEY", "secret")
    file = tmp_path / "r.json"
    flags = ["--num-prompts", "6", "--input-len", "12", "--output-len", "4", "--goodput", "ttft:1000", "--seed", "3"]
    flags += ["--num-warmups", "2", "--api-key-env", "BENCH_KEY", "--json", str(file), "--label", "mine"]
    assert serving(server, *LOAD, "--tokenizer", str(DEMO_MODEL), *flags) == 0
    report = json.loads(file.read_text())
    assert report["requests"]["succeeded"] == 6
    assert report["tokens"]["output"] == 24
    assert report["label"] == "mine"
    assert report["settings"]["data"]["input_len"] == 12
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer secret"}
    assert len([seen for seen in server.seen if seen.body]) == 8
    assert len({seen.body["prompt"] for seen in server.seen if seen.body}) == 8
    output = capsys.readouterr()
    assert "6 of 6 succeeded" in output.out
    assert "goodput" in output.out
    assert output.err == ""  # no progress bar where there is no terminal


def test_sharegpt_and_rate(server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "share.json"
    lines = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "x" * 20}]
    file.write_text(json.dumps([{"conversations": lines}]))
    flags = ["--dataset", "sharegpt", "--dataset-path", str(file), "--num-prompts", "1", "--request-rate", "inf"]
    result = tmp_path / "r.json"
    assert serving(server, *flags, "--endpoint", "chat", "--json", str(result)) == 0
    assert json.loads(result.read_text())["settings"]["pace"]["request_rate"] == "inf"
    assert server.seen[-1].body["messages"] == [{"role": "user", "content": "hello"}]
    assert server.seen[-1].body["max_tokens"] == 5
    assert "1 of 1 succeeded" in capsys.readouterr().out


def test_a_run_in_which_all_failed_is_an_error_after_its_table(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = lambda body: Answer(status=500)
    file = tmp_path / "r.json"
    assert serving(server, *LOAD, "--num-prompts", "3", "--num-warmups", "0", "--json", str(file)) == 2
    output = capsys.readouterr()
    assert "3 x http_500" in output.out
    assert "No request succeeded" in output.err
    assert json.loads(file.read_text())["failures"]["http_500"]["count"] == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: KIND"),
        (["serving"], "required: --base-url"),
        (["serving", "--base-url", "http://h", "--max-concurency", "1"], "Did you mean '--max-concurrency'?"),
        (["serving", "--base-url", "http://h"], "exactly one of --request-rate and --max-concurrency"),
        (["serving", "--base-url", "http://h", *LOAD, "--turns", "2"], "--dataset random has no --turns"),
        (["serving", "--base-url", "http://h", *LOAD, "--goodput", "fast"], "--goodput must look like"),
        (["serving", "--base-url", "http://h", *LOAD, "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["serving", "--base-url", "http://h", *LOAD, "--tokenizer", "/no/such/folder"], "/no/such/folder"),
        (["plot", "--output", "x.png"], "required: FILE.json"),
        (["plot", "missing.json", "--output", "x.png"], "missing.json cannot be read"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert says in refused(capsys, *arguments)


def test_plots_need_results_of_this_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    for text in ("[]", "{}", '{"schema": "other/1"}'):
        file.write_text(text)
        assert "is no result of this version" in refused(capsys, "plot", str(file), "--output", "x.png")


def test_without_matplotlib_a_plot_is_refused_before_the_load(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert serving(server, *LOAD, "--plot", str(tmp_path / "x.png")) == 2
    assert "pip install 'max_ray[benchmark]'" in capsys.readouterr().err
    assert server.seen == []


def report(label: str, speed: float) -> dict[str, Any]:
    point = {"p50": speed, "p90": speed + 1, "p99": None}
    return {
        "schema": "max_ray.benchmark.serving/1",
        "label": label,
        "throughput": {"output_tokens_per_s": speed, "total_tokens_per_s": 2 * speed},
        "latency_ms": dict.fromkeys(("ttft", "tpot", "itl", "e2e"), point),
    }


def test_what_a_plot_shows() -> None:
    drawn = panels([report("a", 1.0), report("b", 5.0)])
    assert [panel.unit for panel in drawn] == ["tokens/s", "ms", "ms", "ms", "ms"]
    assert drawn[0].values == [[1.0, 2.0], [5.0, 10.0]]
    assert drawn[1].groups == ["p50", "p90", "p99"]
    assert drawn[1].values == [[1.0, 2.0, None], [5.0, 6.0, None]]
    assert [shown(value) for value in (None, 0.12345, 12.345, 1234.5)] == ["-", "0.123", "12.3", "1234"]


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, speed in zip(files, (1.0, 5.0), strict=True):
        file.write_text(json.dumps(report(file.stem, speed)))
    picture = tmp_path / "x.png"
    assert cli.main(["benchmark", "plot", *map(str, files), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_and_elsewhere() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(3, stream)
        for failure in (None, "refused", None):
            recording: Any = SimpleNamespace(failure=failure)
            time.sleep(0.11)  # it is drawn ten times a second at most
            progress.note(recording)
        progress.close()
    assert "3/3" in terminal.getvalue()
    assert "failed=1" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r"), "the line is empty again"
    assert file.getvalue() == ""
