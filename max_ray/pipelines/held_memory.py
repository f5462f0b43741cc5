"""What a process holds in memory, to set against the plan. Linux; None elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def held_bytes(device: torch.device) -> int | None:
    """On a GPU what torch's allocator has given out; otherwise the unique set size: pages no other process shares."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
