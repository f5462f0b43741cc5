"""CPU time of a frame, made and read, against a pickle of the same message with a length before it.

    python -m tests.transport.speed

Pairs by turns, median of 9; the digest of each frame is in the figures.
"""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from max_ray.interfaces import BlockRequest, CacheUpdate, RunExtension, RunRequest, RunRow, SamplingParams, StepOutput
from max_ray.transport import codec, run_codec
from max_ray.transport.frames import FrameReader, FrameWriter, MessageType

KEY = bytes(32)
ROUNDS = 9


def decode_row(i: int) -> RunRow:
    return RunRow(
        request_id=f"{i:032x}",
        active_tokens=np.array([i], dtype=np.int64),
        processed_length=500 + i,
        block_table=np.arange(34, dtype=np.int32),
        max_new_tokens=32,
        sampling_params=SamplingParams(temperature=0.7, seed=i),
        stop_ids=frozenset((2, 3)),
        generated_length=100,
        prompt_length=400,
    )


def messages(num_rows: int) -> dict[str, tuple[MessageType, Any, Callable[[Any], bytes], Callable[[bytes], Any]]]:
    """Name -> (type, message, its encoder, its decoder)."""
    run = RunRequest(7, [decode_row(i) for i in range(num_rows)], 32)
    step = (7, StepOutput(3, np.arange(num_rows), np.arange(num_rows + 1), False))
    tables = {i: np.arange(36, dtype=np.int32) for i in range(num_rows)}
    extension = RunExtension(7, 1, 64, np.full(num_rows, 64), tables)
    update = (9, CacheUpdate(requests=[BlockRequest(f"{i:032x}", 600) for i in range(num_rows)]))
    return {
        "run": (MessageType.EXECUTE, run, run_codec.encode_run, run_codec.decode_run),
        "step": (MessageType.STEP, step, lambda m: codec.encode_step(*m), codec.decode_step),
        "extension": (MessageType.EXTEND, extension, codec.encode_extension, codec.decode_extension),
        "update": (MessageType.CACHE_UPDATE, update, lambda m: codec.encode_update(*m), codec.decode_update),
    }


def seconds(work: Callable[[], Any], count: int) -> float:
    started = time.process_time()
    for _ in range(count):
        work()
    return (time.process_time() - started) / count


def main() -> None:
    print("CPU microseconds a message, made and read: frame, pickle, ratio")
    for num_rows in (1, 32, 256):
        count = max(20, 2000 // num_rows)
        for name, (kind, message, encode, decode) in messages(num_rows).items():
            writer, reader = FrameWriter(KEY), FrameReader(KEY, [kind])

            def framed() -> Any:
                ((_, payload),) = reader.feed(writer.frame(kind, encode(message)))  # noqa: B023
                return decode(payload)  # noqa: B023

            def pickled() -> Any:
                return pickle.loads(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))  # noqa: B023

            pairs = [(seconds(framed, count), seconds(pickled, count)) for _ in range(ROUNDS)]
            ours, theirs = (statistics.median(pair[i] for pair in pairs) * 1e6 for i in (0, 1))
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"{num_rows:4} rows  {name:10} {ours:8.1f} {theirs:8.1f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
