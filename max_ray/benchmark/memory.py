"""What models hold in memory against what the plan said: `python -m max_ray.benchmark.memory MODEL [MODEL ...]`.

Each model is loaded in a process of its own, in its stored encoding or in those of `--encodings`. *Measured* is by how
much the written pages that no other process shares (see `held_memory`) grew while the weights were read and packed and
every KV block was written. *Planned* is what `max-ray plan` says for weights and KV cache. The file is what the
model's weights take on disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from max_ray.benchmark.aligned import line
from max_ray.errors import ConfigError
from max_ray.pipelines import PipelineConfig, resolve_plan
from max_ray.planning.hardware import MIB

_HEAD = ("model", "encoding", "file MiB", "planned MiB", "measured MiB", "of planned", "weights of file")
_WIDTHS = (28, 14, 10, 13, 14, 12, 17)


@dataclass(frozen=True)
class Held:
    """Bytes. planned_weights, planned_kv: of the plan; measured: of both together; file: of all tensors as stored."""

    model: str
    encoding: str
    file: int
    planned_weights: int
    planned_kv: int
    measured: int

    @property
    def planned(self) -> int:
        return self.planned_weights + self.planned_kv

    @property
    def of_planned(self) -> float:
        return self.measured / self.planned

    @property
    def weights_of_file(self) -> float:
        """What the weights are measured to hold, as a multiple of the file."""
        return (self.measured - self.planned_kv) / self.file

    def cells(self) -> tuple[str, ...]:
        sizes = [f"{size / MIB:.1f}" for size in (self.file, self.planned, self.measured)]
        return (self.model[-27:], self.encoding, *sizes, f"{self.of_planned:.3f}", f"{self.weights_of_file:.3f}")


def measure(model_path: str, encoding: str | None, max_length: int, max_batch_size: int) -> Held:
    """Loads a model into this process, which should be a fresh one. Raises ConfigError where nothing is told."""
    from max_ray.engine.process_memory import held_bytes, return_freed_memory
    from max_ray.engine.runner import ModelRunner
    from max_ray.pipelines.factory import build_local_runners, plan_device
    from max_ray.planning.checkpoint import open_checkpoint

    settings = {} if encoding is None else {"quantization_encoding": encoding}
    config = PipelineConfig(
        model_path=model_path, devices="cpu", max_length=max_length, max_batch_size=max_batch_size, **settings
    )
    plan = resolve_plan(config)
    return_freed_memory()
    before = held_bytes(plan_device(plan))
    (runner,) = build_local_runners(plan)
    assert isinstance(runner, ModelRunner), "an embedding model has no cache"
    for cache in (*runner.storage.keys, *runner.storage.values):
        cache.fill_(1)
    after = held_bytes(plan_device(plan))
    if before is None or after is None:
        raise ConfigError("This system does not tell what a process holds: /proc/self/smaps_rollup is missing.")
    source = open_checkpoint(Path(plan.model_dir), plan.weights_format, plan.huggingface_config, plan.encoding)
    planned = (plan.memory.weights, plan.memory.kv_cache)
    return Held(config.served_model_name, plan.encoding.value, source.nbytes(), *planned, after - before)


def measure_apart(model_path: str, encoding: str | None, max_length: int = 512, max_batch_size: int = 4) -> Held:
    """`measure` in a process of its own. Raises ConfigError with what that said last, where it failed."""
    options = ["--max-length", str(max_length), "--max-batch-size", str(max_batch_size)]
    chosen = [] if encoding is None else ["--encodings", encoding]
    command = [sys.executable, "-m", __spec__.name, "--here", model_path, *chosen, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ConfigError(f"{model_path} could not be measured: {result.stderr.strip().splitlines()[-1:]}")
    return Held(**json.loads(result.stdout.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m max_ray.benchmark.memory", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--encodings", help="comma-separated; each model in each of them")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-batch-size", type=int, default=4)
    parser.add_argument("--here", action="store_true", help="in this process; prints JSON")
    options = parser.parse_args(arguments)
    encodings: list[str | None] = [None] if options.encodings is None else options.encodings.split(",")
    shape = (options.max_length, options.max_batch_size)
    if options.here:
        return print(json.dumps(asdict(measure(options.models[0], encodings[0], *shape))))
    print(line(_HEAD, _WIDTHS))
    for model in options.models:
        for encoding in encodings:
            print(line(measure_apart(model, encoding, *shape).cells(), _WIDTHS), flush=True)


if __name__ == "__main__":
    main()
