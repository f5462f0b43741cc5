"""How fast a checkpoint is read, against the page cache: `python -m max_ray.benchmark.loading MODEL`.

    | column     | what                                                                                          |
    |------------|-------------------------------------------------------------------------------------------------|
    | page cache | one thread that reads the files into a buffer of 2 MiB, and keeps nothing                       |
    | reads      | every plain matrix, chunk by chunk and by as many threads as loading reads it, and nothing kept |
    | fresh      | as many bytes of memory that is new to this process, written once: no copy in memory is faster  |
    | load       | the phases load and compile of a start: reads, packs, writes to fresh memory                    |

The files are read once before, so that they are in the page cache. The model is loaded into this process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from max_ray.benchmark.aligned import line
from max_ray.distributed import TPGroup
from max_ray.gguf import gguf_parts
from max_ray.host_memory import zeros
from max_ray.modeling.packed_loading import CHUNK_BYTES
from max_ray.pipelines import PipelineConfig, resolve_plan
from max_ray.pipelines.factory import build_runner, rank_device
from max_ray.planning.checkpoint import open_checkpoint
from max_ray.weights import TensorEntry, WeightSource
from max_ray.weights.safetensors_file import read_chunks

_BUFFER_BYTES = 1 << 21
_CACHE_GIB = 1 / 16  # a cache that takes no time; the length follows from it
_HEAD = ("run", "page cache GB/s", "reads GB/s", "of page cache", "fresh GB/s", "load s", "load GB/s")
_WIDTHS = (4, 17, 12, 15, 12, 8, 11)


def read_files(files: Iterable[Path]) -> float:
    """Bytes a second."""
    buffer = bytearray(_BUFFER_BYTES)
    count, started = 0, time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while got := stream.readinto(buffer):
                count += got
    return count / (time.perf_counter() - started)


def read_tensors(source: WeightSource, num_threads: int) -> float:
    """Bytes a second; of the matrices that lie in a file as they are (0 where there are none)."""
    entries = [entry for name in source.names() if (entry := source.file_entry(name)) and len(entry.shape) == 2]
    started = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(_read_through, entries))
    return sum(entry.nbytes for entry in entries) / (time.perf_counter() - started)


def _read_through(entry: TensorEntry) -> None:
    rows, columns = (range(size) for size in entry.shape)
    for _ in read_chunks(entry, rows, columns, max(1, CHUNK_BYTES * len(rows) // entry.nbytes)):
        pass


def write_fresh(nbytes: int) -> float:
    """Bytes a second."""
    started = time.perf_counter()
    zeros(nbytes).fill_(1)
    return nbytes / (time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m max_ray.benchmark.loading", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args(arguments)
    plan = resolve_plan(PipelineConfig(model_path=options.model, devices="cpu", kv_cache_memory=_CACHE_GIB))
    torch.set_num_threads(plan.num_threads)
    place = Path(plan.model_dir)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else gguf_parts(place)
    source = open_checkpoint(place, plan.weights_format, plan.huggingface_config, plan.encoding)
    nbytes = source.nbytes()
    read_files(files)
    print(f"{options.model}: {nbytes / 1e9:.2f} GB, {plan.num_threads} threads")
    print(line(_HEAD, _WIDTHS))
    for run in range(options.runs):
        cached, read, fresh = read_files(files), read_tensors(source, plan.num_threads), write_fresh(nbytes)
        durations: dict[str, float] = {}
        build_runner(plan, TPGroup.single(rank_device(plan, 0)), durations)
        seconds = durations["load"] + durations["compile"]
        reads = [f"{read / 1e9:.2f}", f"{read / cached:.2f}"] if read else ["-", "-"]
        rest = [f"{number:.2f}" for number in (fresh / 1e9, seconds, nbytes / seconds / 1e9)]
        print(line([run, f"{cached / 1e9:.2f}", *reads, *rest], _WIDTHS), flush=True)


if __name__ == "__main__":
    main()
