"""The visit: all steps, one after the other, each with a limit of its own; see the package's header.

Exit code: 0 when every step came to its end and every case passed; 1 otherwise; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from max_ray.benchmark.gpu.steps import STEPS, Step
from max_ray.benchmark.gpu.supervisor import LOG_NAME, RESULTS_NAME, Outcome, Supervisor

_SEES_GPU = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
_GPU = {"GPU_REQUIRED": "1"}
_REHEARSAL = {"TRITON_INTERPRET": "1", "GPU_REHEARSAL": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def visit(folder: Path, steps: Sequence[Step], *, rehearse: bool, limit_factor: float = 1.0) -> list[Outcome]:
    """Runs the steps; none keeps the next from starting.

    Args:
        folder: Gets results.jsonl and log.txt; earlier ones are removed.
        steps: What to run.
        rehearse: Whether to run their rehearsals.
        limit_factor: Factor of the limits: a rehearsal's machine may be slow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS_NAME, LOG_NAME):
        (folder / name).unlink(missing_ok=True)
    supervisor = Supervisor(folder, _REHEARSAL if rehearse else _GPU)
    outcomes = []
    for step in steps:
        supervisor.say(f"== {time.strftime('%H:%M:%S')} {step.name}, at most {step.limit_s * limit_factor:.0f} s")
        for outcome in _run(supervisor, step, rehearse, limit_factor):
            outcomes.append(outcome)
            supervisor.say(_line(outcome))
    with (folder / RESULTS_NAME).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(o) | {"case": "", "state": "step"}) + "\n" for o in outcomes)
    supervisor.say("\n".join(["== summary", *map(_line, outcomes)]))
    return outcomes


def _run(supervisor: Supervisor, step: Step, rehearse: bool, limit_factor: float) -> list[Outcome]:
    command, limit_s = step.rehearsal if rehearse else step.command, step.limit_s * limit_factor
    if step.num_processes == 1:
        return [supervisor.run(step.name, command, limit_s)]
    count = step.num_processes

    def run(number: int) -> Outcome:
        return supervisor.run(f"{step.name} {number + 1}/{count}", command, limit_s)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(1 if rehearse else count)))


def _line(outcome: Outcome) -> str:
    end = "finished" if outcome.finished else "LIMIT" if outcome.timed_out else f"DIED, exit code {outcome.exit_code}"
    counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
    return f"   {outcome.step}: {end} after {outcome.seconds:.0f} s; {counts}"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m max_ray.benchmark.gpu", allow_abbrev=False)
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="Folder for results and log.")
    parser.add_argument("--rehearse", action="store_true", help="On a CPU: tiny sizes, kernels in the interpreter.")
    parser.add_argument("--steps", default="", metavar="NAME,NAME", help="Only these steps. Default: all.")
    parser.add_argument(
        "--limit-factor", type=float, default=1.0, metavar="X", help="Factor of all limits. Default: 1."
    )
    options = parser.parse_args(arguments)
    names = [name for name in options.steps.split(",") if name]
    unknown = sorted(set(names) - {step.name for step in STEPS})
    if unknown:
        parser.error(f"no such step: {', '.join(unknown)}; steps: {', '.join(step.name for step in STEPS)}")
    if not options.rehearse and subprocess.run([sys.executable, "-c", _SEES_GPU], check=False).returncode != 0:
        print("error: PyTorch sees no GPU here. `--rehearse` runs the steps on a CPU.", file=sys.stderr)
        return 2
    steps = [step for step in STEPS if not names or step.name in names]
    outcomes = visit(options.results, steps, rehearse=options.rehearse, limit_factor=options.limit_factor)
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
