"""What of a server's output is on the terminal, and what is in the file."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from max_ray.config import PipelineConfig
from max_ray.planning.hardware import GIB, Hardware
from max_ray.planning.plan import resolve_plan
from max_ray.serve.start_summary import start_summary
from tests.checkpoints import make_llama
from tests.serve.commands import environment

PROGRAM = """
import logging, os, subprocess, sys
from max_ray.log import setup_logging
from max_ray.serve.terminal import server_terminal

@server_terminal()
def main():
    setup_logging("INFO")
    print("ours")
    print("\\x1b[36m(ServeController pid=7)\\x1b[0m Traceback")
    print("(raylet) retried", file=sys.stderr)
    print("(ModelWorker pid=7) 2026-11-30 23:32:12,972 ERROR max_ray.engine: broken", file=sys.stderr)
    os.write(2, b"of the C++ core\\n")
    os.write(1, b"of a library\\n")
    subprocess.run(["sh", "-c", "echo of a child; echo of its stderr >&2"])
    logging.getLogger("max_ray.x").info("loading")
    logging.getLogger("max_ray.x").warning("careful")
    logging.getLogger("other").warning("of another library")
    print("max-ray: error: a sentence", file=sys.stderr)
    print("Serving m")
    logging.getLogger("max_ray.x").info("after the start")
    FAIL

try:
    main()
except (KeyboardInterrupt, ValueError) as error:
    print(type(error).__name__, file=sys.stderr)
print("afterwards")
os.write(1, b"restored\\n")
"""
HIDDEN = (
    *("Traceback", "retried", "of the C++ core", "of a library", "of a child", "of its stderr", "loading"),
    *("of another library", "after the start"),
)


def ran(tmp_path: Path, fail: str = "pass", **variables: str) -> subprocess.CompletedProcess[str]:
    code = PROGRAM.replace("FAIL", fail)
    env = environment(MAX_RAY_CACHE_DIR=str(tmp_path / "cache"), **variables)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=True)


def log_of(done: subprocess.CompletedProcess[str]) -> Path:
    (path,) = re.findall(r"^The log is in (\S+) ", done.stdout)
    return Path(path)


def test_ours_is_on_the_terminal_and_all_else_in_the_file(tmp_path: Path) -> None:
    done = ran(tmp_path)
    assert done.stdout.splitlines()[1:] == ["ours", "Serving m", "afterwards", "restored"]
    kept = done.stderr.splitlines()
    assert [line.rpartition(": ")[2] for line in kept] == ["broken", "careful", "a sentence"]
    text = log_of(done).read_text()
    for line in HIDDEN:
        assert line in text
    assert "ERROR max_ray.engine: broken" in text
    assert log_of(done).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("fail", ["raise ValueError", "os.kill(os.getpid(), 2)"])
def test_streams_are_back_after_an_error_and_sigint_counts_in_the_background(tmp_path: Path, fail: str) -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell leaves it to a job in the background
    try:
        done = ran(tmp_path, fail)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert done.stderr.splitlines()[-1] == ("ValueError" if "Value" in fail else "KeyboardInterrupt")
    assert done.stdout.endswith("afterwards\nrestored\n")


def test_with_a_log_level_everything_stays_on_the_terminal(tmp_path: Path) -> None:
    done = ran(tmp_path, MAX_RAY_LOG_LEVEL="INFO")
    for line in HIDDEN:
        assert line in done.stdout + done.stderr
    assert not (tmp_path / "cache").exists()


def test_without_a_place_for_the_file_everything_stays_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    done = ran(tmp_path)
    assert "Traceback" in done.stdout
    assert "The log is in" not in done.stdout


def test_old_files_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "logs"
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"serve-x{number}.log").write_text("")
        os.utime(folder / f"serve-x{number}.log", (number, number))
    newest = log_of(ran(tmp_path))
    left = {path.name for path in folder.iterdir()}
    assert left == {newest.name, *(f"serve-x{number}.log" for number in range(11, 30))}


def test_a_terminal_shows_what_the_start_is_doing_in_a_line_that_goes(tmp_path: Path) -> None:
    main, worker = pty.openpty()
    env = environment(MAX_RAY_CACHE_DIR=str(tmp_path / "cache"))
    code = PROGRAM.replace("FAIL", "pass")
    with subprocess.Popen([sys.executable, "-c", code], stdout=worker, stderr=worker, env=env) as process:
        os.close(worker)
        said = b""
        while True:
            try:
                chunk = os.read(main, 4096)
            except OSError:  # Linux says so when the other side has closed
                break
            said += chunk
        assert process.wait(60) == 0
    os.close(main)
    assert b"\r\x1b[K  loading\r\x1b[K" in said
    assert b"after the start" not in said


def test_the_summary_names_the_flags(tmp_path: Path) -> None:
    config = PipelineConfig(model_path=str(make_llama(tmp_path / "tiny")), served_model_name="t")
    machine = Hardware(4, 8 * GIB, 0)
    text = start_summary(resolve_plan(config, hardware=machine))
    assert text.splitlines()[0].startswith("Loading t: LlamaForCausalLM in float32 on the CPU, from ")
    for flag in ("--kv-cache-memory", "--max-batch-size", "--max-length"):
        assert flag in text
    on_gpu = start_summary(resolve_plan(config, hardware=Hardware(4, 8 * GIB, 2)))
    assert "on 1 GPU," in on_gpu
    assert "what a GPU has left (--kv-cache-memory, --device-memory-utilization)" in on_gpu
