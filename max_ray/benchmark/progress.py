"""A progress bar on a terminal; nothing where stderr is a file or a pipe."""

from __future__ import annotations

from typing import TextIO

from tqdm import tqdm

from max_ray.benchmark.client import Recording


class Progress:
    """Counts ended requests.

    Args:
        total: How many there will be.
        stream: Where the bar is drawn; stderr by default.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._bar = tqdm(total=total, unit="request", leave=False, disable=None, file=stream)
        self._failed = 0

    def note(self, recording: Recording) -> None:
        """A request has ended."""
        if recording.failure is not None:
            self._failed += 1
            self._bar.set_postfix(failed=self._failed, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Takes the bar off the terminal."""
        self._bar.close()
