"""A batch from a file to a file, in this process: the lines of /v1/batches, without a server.

Each request gets a line in the output file, as soon as it is done; a failed one with its error. A file that was begun
is gone on with: requests whose custom_id has a line there are not run again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from max_ray.errors import InputError, quoted
from max_ray.serve.api.batches.lines import MAX_LINE_BYTES, error_line, parse_line, read_lines
from max_ray.serve.api.batches.runner import LineRunner
from max_ray.serve.api.routes import build_line_api
from max_ray.serve.local_engine import LocalEngine


@dataclass
class OfflineBatch:
    """What is to be done. Made by `read`.

    Args:
        source: The input file.
        target: The output file.
        num_lines: Lines of the input.
        done: custom_ids of the lines that the output has already.
        num_failed: Requests of this run that failed.
    """

    source: Path
    target: Path
    num_lines: int
    done: set[str] = field(default_factory=set)
    num_failed: int = 0

    @classmethod
    def read(cls, source: Path, target: Path) -> OfflineBatch:
        """Looks through both files. A last line of the output that was torn is cut off.

        Raises:
            InputError: A file cannot be read, two lines have one custom_id, or the output is no file of results.
        """
        if source.resolve() == target.resolve():
            raise InputError("The input and the output are the same file.")
        try:
            return cls(source, target, _num_lines(source), _done(target))
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}.") from None

    async def run(self, engine: LocalEngine, on_done: Callable[[], None]) -> None:
        """Runs what is left.

        Args:
            engine: Loaded, and started on this event loop.
            on_done: Called after each line.
        """
        lines = LineRunner(build_line_api(engine))
        with self.source.open("rb") as source, self.target.open("ab", buffering=0) as target:
            left = self._left(source)

            async def work() -> None:
                for custom_id, line in left:  # all workers take from the one iterator
                    is_success, result = await _result(lines, custom_id, line)
                    target.write(result)
                    self.num_failed += not is_success
                    on_done()

            async with asyncio.TaskGroup() as group:
                for _ in range(2 * engine.max_batch_size):  # prompts are ready when a place in the batch is free
                    group.create_task(work())

    def _left(self, source: BinaryIO) -> Iterator[tuple[str, bytes]]:
        for number, _, line in read_lines(source):
            custom_id = _custom_id(line) or _name_of(number)
            if custom_id not in self.done:
                yield custom_id, line


async def _result(lines: LineRunner, custom_id: str, line: bytes) -> tuple[bool, bytes]:
    if len(line) > MAX_LINE_BYTES:
        return False, error_line(custom_id, "invalid_request", f"The line is longer than {MAX_LINE_BYTES} bytes.")
    try:
        return await lines.run(parse_line(line))
    except InputError as error:
        return False, error_line(custom_id, "invalid_request", str(error))


def _num_lines(source: Path) -> int:
    names: set[str] = set()
    num_lines = 0
    with source.open("rb") as file:
        for number, _, line in read_lines(file):
            num_lines += 1
            custom_id = _custom_id(line)
            if custom_id is not None and custom_id in names:
                raise InputError(f"{source}, line {number}: the custom_id {quoted(custom_id)} stands in two lines.")
            names.add(custom_id or "")
    return num_lines


def _done(target: Path) -> set[str]:
    if not target.exists():
        return set()
    done: set[str] = set()
    size = 0
    with target.open("rb+") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            size += len(line)
            custom_id = _custom_id(line)
            if custom_id is None:
                raise InputError(f"{target}, line {number}: this is no result of a batch. Give another output file.")
            done.add(custom_id)
        file.truncate(size)
    return done


def _custom_id(line: bytes) -> str | None:
    """None for a line that has none, or is no JSON object."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    custom_id = content.get("custom_id") if isinstance(content, dict) else None
    return custom_id if isinstance(custom_id, str) and custom_id else None


def _name_of(number: int) -> str:
    """The custom_id of a result whose request has none."""
    return f"line {number}"
