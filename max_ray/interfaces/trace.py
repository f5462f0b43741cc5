"""RequestTrace: what happened to a request in the scheduler, and when."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WaitReason(Enum):
    """Why a request was not admitted at once."""

    TURN = "turn"
    """Other requests went first."""
    BATCH_FULL = "batch_full"
    KV_BLOCKS = "kv_blocks"
    PROMPT_TOKENS = "prompt_tokens"
    """The next step has prompt tokens enough."""
    PREFIX = "prefix"
    """Another request was computing the same prefix."""
    QUARANTINE = "quarantine"
    """Another request had to run alone."""


@dataclass(slots=True)
class RequestTrace:
    """Times are monotonic seconds; None: not yet.

    Attributes:
        submitted_at: The request was queued.
        admitted_at: It got its first blocks.
        ended_at: It left the scheduler.
        wait_reason: The last reason why it was not admitted.
        num_preemptions: How often its blocks were taken back.
        num_blocks: KV blocks that it held at most.
    """

    submitted_at: float | None = None
    admitted_at: float | None = None
    ended_at: float | None = None
    wait_reason: WaitReason | None = None
    num_preemptions: int = 0
    num_blocks: int = 0
