"""Ranges of TCP ports in settings."""

from __future__ import annotations

import re

_PORTS = re.compile(r"(\d{1,5})-(\d{1,5})", re.ASCII)


def parse_port_range(text: str) -> tuple[int, int] | None:
    """(lowest, highest) of "LOW-HIGH"; None for anything else."""
    match = _PORTS.fullmatch(text)
    if match is None:
        return None
    low, high = int(match[1]), int(match[2])
    return (low, high) if 1 <= low <= high <= 65535 else None
