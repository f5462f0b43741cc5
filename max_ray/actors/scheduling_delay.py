"""SchedulingDelay: how long the threads of a computation have waited for a processor.

On a busy machine a healthy step takes long. Linux counts for each thread the time in which it could have run but had no
processor; a thread that hangs, in a lock or in a collective, has none.
"""

from __future__ import annotations

from pathlib import Path

_TASKS = Path("/proc/self/task")


class SchedulingDelay:
    """Adds up the delay of the slowest thread of each interval between two calls of `read`."""

    def __init__(self) -> None:
        self._delays: dict[str, float] = {}
        self._total_s = 0.0

    def read(self, thread_id: int) -> float:
        """Seconds of delay since the process started, of a thread and those that it started.

        Args:
            thread_id: The operating system's id of the thread that computes. Threads that it starts have its name;
                those of Ray have names of their own, and do not count.

        Returns:
            A number that never falls; 0.0 where the system does not count delays.
        """
        now = _delays_like(thread_id)
        longest = max((delay - self._delays.get(thread, 0.0) for thread, delay in now.items()), default=0.0)
        self._delays = now
        self._total_s += max(0.0, longest)
        return self._total_s


def _delays_like(thread_id: int) -> dict[str, float]:
    """Seconds by thread id, of the threads with the same name."""
    name = _text(_TASKS / str(thread_id) / "comm")
    if name is None:
        return {}
    found = {}
    for task in _TASKS.iterdir():
        numbers = _text(task / "schedstat") if _text(task / "comm") == name else None
        if numbers is not None:
            found[task.name] = int(numbers.split()[1]) / 1e9
    return found


def _text(path: Path) -> str | None:
    """The file's text; None when the thread has ended, or the system has no such file."""
    try:
        return path.read_text()
    except OSError:
        return None
