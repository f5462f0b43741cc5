"""Tables of results on the terminal, and their file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from max_ray.errors import ConfigError


def line(cells: Sequence[object], widths: Sequence[int]) -> str:
    """The first cell to the left, the others to the right."""
    first, *rest = (str(cell) for cell in cells)
    return first.ljust(widths[0]) + "".join(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))


def write_results(path: str | None, results: dict[str, Any]) -> None:
    """Does nothing without a path. Raises ConfigError where the file cannot be written."""
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
