"""Load times of SmolLM2's GGUF file, here and in llama.cpp, by turns, each in a process of its own.

    LLAMA_CPP_PYTHON=venv/bin/python python -m tests.slow.load_times [--count 5]

What counts: here the plan, the tokenizer, the weights and the KV cache of 2048 tokens, so that the pipeline can run; of
llama.cpp `Llama(path, n_ctx=2048)`. Starting a process and importing packages do not count. The file is in the page
cache. CPU seconds are of all threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from tests.slow.peer import ask, smollm2

_CONTEXT = 2048


def load_here(path: str) -> tuple[float, float]:
    """(seconds, CPU seconds) of one load in this process."""
    import max_ray.engine.graphs
    import max_ray.engine.kv_storage
    import max_ray.engine.local_executor
    import max_ray.engine.runner
    import max_ray.tokenization.tokenizer  # noqa: F401
    from architectures import llama3  # noqa: F401
    from max_ray.config import PipelineConfig
    from max_ray.kernels import native
    from max_ray.pipelines.factory import build_factory

    native.library()  # the compiled kernels: as an import
    started, cpu = time.perf_counter(), time.process_time()
    _, factory = build_factory(PipelineConfig(model_path=path, devices="cpu", max_length=_CONTEXT, max_batch_size=1))
    factory()
    return time.perf_counter() - started, time.process_time() - cpu


def main() -> None:
    """Prints every run and the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--path", help="for the process of one load")
    arguments = parser.parse_args()
    if arguments.path is not None:
        print(json.dumps(load_here(arguments.path)))
        return
    path = str(smollm2())
    runs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for _ in range(arguments.count):
        command = [sys.executable, "-m", "tests.slow.load_times", "--path", path]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        theirs = ask("load", path=path, n_ctx=_CONTEXT, count=1)
        here = json.loads(lines[-1])
        runs.append(((here[0], here[1]), (theirs["seconds"][0], theirs["cpu_seconds"][0])))
        print("here {:.3f} s, {:.3f} CPU s; llama.cpp {:.3f} s, {:.3f} CPU s".format(*runs[-1][0], *runs[-1][1]))
    for what, i in (("seconds", 0), ("CPU seconds", 1)):
        own, other = (statistics.median(run[side][i] for run in runs) for side in (0, 1))
        print(f"median {what}: here {own:.3f}, llama.cpp {other:.3f}, ratio {own / other:.2f}")


if __name__ == "__main__":
    main()
