"""`max-ray serve` and `serve run` as processes of their own, with a Ray of their own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_llama
from tests.serve.commands import BIN, MARK, environment, marked, still_alive, until_said
from tests.serve.conftest import free_port

RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray 2.60's own two agents spend a minute on telling a GCS that is gone that their raylet is gone, and then end."""


def test_serve_run_says_mistakes_in_a_sentence(tmp_path: Path) -> None:
    for argument, sentence in {
        "modl_path=x": "There is no setting 'modl_path'. Did you mean 'model_path'?",
        "port=http": "port should be a valid integer",
        f"model_path={tmp_path}": "config.json",
    }.items():
        run = subprocess.run(
            [BIN / "serve", "run", "deployments:app", argument],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=120,
        )
        assert run.returncode != 0
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr


def refused(*flags: str) -> str:
    """What `max-ray serve` says at last when it does not serve; nothing that it started is left."""
    mark = uuid4().hex
    run = subprocess.run(
        [BIN / "max-ray", "serve", "--num-threads", "1", *flags],
        capture_output=True,
        text=True,
        env=environment(**{MARK: mark}),
        timeout=150,
    )
    assert run.returncode == 2, run.stderr[-3000:]
    assert still_alive(marked(mark), 5) == []
    assert "Traceback" not in run.stdout + run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("max-ray: error: ")
    return last


def test_max_ray_serve_says_mistakes_in_a_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCasualLM"]}))
    without = tmp_path / "without"
    make_llama(without, tokenizer=False)
    mistakes = [
        (["--model-path", str(tmp_path / "nowhere")], "nowhere"),
        (["--model-path", str(without)], "put the model's tokenizer.json"),
        (["--model-path", str(tmp_path)], "Did you mean 'LlamaForCausalLM'?"),
        (["--model-path", str(tiny_llama), "--tensor-parallel-size", "8"], "heads"),
    ]
    with ThreadPoolExecutor(2) as threads:
        said = list(threads.map(lambda mistake: refused(*mistake[0]), mistakes))
    for sentence, (_, expected) in zip(said, mistakes, strict=True):
        assert expected in sentence


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("size", ["1", "2"])
def test_a_missing_weight_is_named_and_not_tried_for_ever(tmp_path: Path, size: str) -> None:
    """Found by the workers when they load: the sentence must come all the way back to the terminal."""
    file = make_llama(tmp_path / "model") / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    flags = ["--model-path", str(file.parent), "--port", str(free_port()), "--tensor-parallel-size", size]
    assert "lacks 1 tensor (model.layers.1.mlp.up_proj.weight)" in refused(*flags)


def serving(
    model: Path, port: int, log: Path, in_background: bool = False
) -> AbstractContextManager[tuple[psutil.Process, list[psutil.Process]]]:
    """`max-ray serve` until it is ready: the process and everything it started. in_background: as shells start jobs
    there, with SIGINT ignored."""
    command = [BIN / "max-ray", "serve", "--model-path", str(model), "--port", str(port), "--num-threads", "1"]
    command += ["--served-model-name", "tiny"]
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command] if in_background else command
    return until_said(command, "Serving", log)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("ending", "in_background"),
    [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False)],
    ids=["ctrl-c", "background", "terminate"],
)
def test_an_ended_server_leaves_nothing_behind(
    tiny_llama: Path, tmp_path: Path, ending: signal.Signals, in_background: bool
) -> None:
    port, log = free_port(), tmp_path / "log"
    with serving(tiny_llama, port, log, in_background) as (process, started):
        curl = next(line.strip() for line in log.read_text().splitlines() if line.strip().startswith("curl "))
        answer = subprocess.run(["sh", "-c", f"{curl} --silent --max-time 60"], capture_output=True, text=True)
        assert '"finish_reason"' in answer.stdout, answer
        process.send_signal(ending)
        assert still_alive([process, *started], 10) == []
    lines = log.read_text().splitlines()
    assert lines[-1] == "Stopping ...", "neither Ray nor Serve has the last word"
    assert len(lines) <= 13, f"12 lines of the start, and the end: {lines}"
    (named,) = re.findall(r"The log is in (\S+)", lines[0])
    assert "startup: load took" in Path(named).read_text()
    for said in ("Loading tiny: LlamaForCausalLM in", "KV cache", "(--kv-cache-memory)", f"http://127.0.0.1:{port}/v1"):
        assert said in "\n".join(lines)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_driver_takes_the_ray_that_it_started_with_it(tiny_llama: Path, tmp_path: Path) -> None:
    port = free_port()
    with serving(tiny_llama, port, tmp_path / "log") as (process, started):
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200
        agents = [child for child in started if child.cmdline()[0].startswith(RAY_AGENTS)]
        process.kill()
        assert still_alive([process, *(child for child in started if child not in agents)], 15) == []
        assert still_alive(agents, 100) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
