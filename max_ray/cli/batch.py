"""`max-ray batch`: requests of a file answered in this process."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from max_ray.config import PipelineConfig

FLAGS = ("input", "output")
"""What a command line has beside the settings."""


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the two files to a parser."""
    parser.add_argument("input", help="JSONL file, a line for each request: custom_id, method, url and body.")
    parser.add_argument("output", help="File for the results. One that was begun is gone on with.")


def run_batch(config: PipelineConfig, given: dict[str, Any]) -> None:
    """Answers every request of a file; says at the end how many failed. Raises MaxRayError."""
    from max_ray.serve.api.structured_output_fields import close_checker
    from max_ray.serve.local_engine import LocalEngine
    from max_ray.serve.offline_batch import OfflineBatch

    batch = OfflineBatch.read(Path(given["input"]), Path(given["output"]))
    engine = LocalEngine.load(config)
    try:
        asyncio.run(_run(batch, engine))
    finally:
        close_checker()
    print(f"{batch.num_lines} requests, {batch.num_failed} of this run failed: {batch.target}", file=sys.stderr)


async def _run(batch: Any, engine: Any) -> None:
    from tqdm import tqdm

    engine.start()
    try:
        with tqdm(desc="requests", total=batch.num_lines, initial=len(batch.done), unit="", disable=None) as bar:
            await batch.run(engine, bar.update)
    finally:
        await engine.close()
