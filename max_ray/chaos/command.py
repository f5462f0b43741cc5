"""The command `max-ray chaos`: its flags. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
from typing import Any


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `max-ray chaos`."""
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="Root of a server on this machine.")
    add("--api-key-env", metavar="NAME", help="Environment variable that holds the API key.")
    add(
        "--duration",
        type=float,
        metavar="SECONDS",
        help="After that no fault begins. Default: 60, or no limit with --rounds.",
    )
    add("--rounds", type=int, metavar="N", help="Ends when there are so many rounds, those of --resume among them.")
    add("--resume", metavar="FILE", help="Keeps rounds in a file, and goes on behind those that are in it.")
    add("--seed", type=int, default=0, metavar="N", help="Of the schedule: the same seed, the same faults. Default: 0.")
    add("--streams", type=int, default=8, metavar="N", help="Streams that are open at a time. Default: 8.")
    add("--max-tokens", type=int, default=200, metavar="N", help="Tokens of a stream. Default: 200.")
    add(
        "--kinds",
        metavar="LIST",
        help="Of worker, kv_manager, registry, stream_journal, replica, haproxy. Default: all.",
    )


def run(options: dict[str, Any]) -> None:
    """Runs the drill. Raises ConfigError for wrong flags, ServerFailedError on any loss: exit code 1."""
    from max_ray.chaos.drill import run_drill

    run_drill(options)
