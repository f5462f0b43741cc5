"""`make gpu` without a GPU: no failure hides the rest, every result is on the disk, steps are bounded and rehearsed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from max_ray.benchmark import timing
from max_ray.benchmark.case_log import CaseLog, read_log
from max_ray.benchmark.gpu import __main__ as visit
from max_ray.benchmark.gpu.steps import STEPS, TOTAL_LIMIT_S, Step
from max_ray.benchmark.gpu.supervisor import Supervisor

ROOT = Path(__file__).parents[2]
CRASHING = ("-m", "tests.benchmark.crashing_cases")


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def states(folder: Path) -> dict[str, str]:
    return {record["case"]: record["state"] for record in read_log(folder / "results.jsonl") if record["case"]}


def test_cases_that_fail_or_kill_their_process_hide_nothing(tmp_path: Path) -> None:
    outcome = Supervisor(tmp_path, {}).run("crashing", CRASHING, 60)
    assert states(tmp_path) == {
        "good": "passed",
        "raises": "failed",
        "disagrees": "failed",
        "dies": "failed",
        "loses the device": "failed",
        "last": "passed",
    }
    assert (outcome.finished, outcome.passed, outcome.failed, outcome.is_good) == (True, 2, 4, False)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("this case is wrong") >= 1
    assert "the device is lost" in log


def test_a_step_that_hangs_ends_at_its_limit_and_the_next_one_runs(tmp_path: Path) -> None:
    hanging, good = (*CRASHING, "--hang"), ("-c", "from max_ray.benchmark.case_log import CaseLog as C\n"
        "log = C.from_environment('x'); log.run('one', dict); log.finish()")  # fmt: skip
    steps = [Step("hanging", 6, hanging, hanging), Step("good", 30, good, good)]
    first, second = visit.visit(tmp_path, steps, rehearse=True)
    assert first.timed_out
    assert not first.finished
    assert 5 < first.seconds < 12
    assert second.is_good
    assert states(tmp_path)["hangs"] == "started"
    steps_said = [record for record in read_log(tmp_path / "results.jsonl") if record["state"] == "step"]
    assert [(record["step"], record["timed_out"]) for record in steps_said] == [("hanging", True), ("good", False)]


def test_results_are_on_the_disk_before_the_next_case(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    log = CaseLog("s", file)
    log.run("one", lambda: {"seconds": 3.0})
    log.run("two", lambda: {"seen": [record["case"] for record in read_log(file)]})
    assert read_log(file)[-1]["seen"] == ["one", "one", "two"]
    assert CaseLog("s", file).is_done("two")
    assert not CaseLog("other", file).is_done("two")


def test_the_limits_are_less_than_nine_minutes() -> None:
    assert sum(step.limit_s for step in STEPS) <= TOTAL_LIMIT_S == 540
    assert [step.name for step in STEPS[:3]] == ["machine", "model", "offline"]


def test_a_machine_without_a_gpu_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not torch.cuda.is_available(), "this test is for machines without a GPU"
    assert visit.main(["--results", str(tmp_path)]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    environment = os.environ | {"GPU_REQUIRED": "1"}
    command = [sys.executable, "-m", "pytest", "-c", "tests/gpu/pytest.ini", "tests/gpu", "--collect-only"]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 4


def test_make_gpu_asks_for_a_folder() -> None:
    answer = subprocess.run(["make", "-n", "gpu"], capture_output=True, text=True, check=False)
    assert answer.returncode != 0
    assert "RESULTS=folder" in answer.stderr
    answer = subprocess.run(["make", "-n", "gpu", "RESULTS=x"], capture_output=True, text=True, check=True)
    assert "--results x" in answer.stdout


@pytest.mark.parametrize(("nbytes", "copies"), [(1, 200), (2**20, 200), (64 * 2**20, 4), (2**30, 1)])
def test_timed_calls_take_turns_over_more_than_the_cache(nbytes: int, copies: int) -> None:
    assert timing.num_copies(nbytes, torch.device("cuda", 0)) == copies
    assert timing.num_copies(nbytes, torch.device("cpu")) == 1


def test_each_copy_is_called_as_often_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SAMPLE_S", 0.0)
    counts = [0, 0, 0]

    def call(index: int) -> None:
        counts[index] += 1

    timing.seconds([lambda i=i: call(i) for i in range(3)], torch.device("cpu"))  # type: ignore[misc]
    assert len(set(counts)) == 1


@pytest.mark.timeout(300)
def test_rehearsal(tmp_path: Path) -> None:
    """The scheduling loop, the sampler and the Triton kernels in their interpreter."""
    pytest.importorskip("triton")
    code = visit.main(["--rehearse", "--results", str(tmp_path), "--steps", "machine,loop", "--limit-factor", "4"])
    assert code == 0, (tmp_path / "log.txt").read_text()[-5000:]
    assert set(states(tmp_path).values()) == {"passed"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_rehearsal_of_every_step(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert visit.main(["--rehearse", "--results", str(tmp_path), "--limit-factor", "4"]) == 0
