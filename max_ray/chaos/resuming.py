"""A stream that is read on over another connection where its own breaks."""

from __future__ import annotations

import asyncio
import re
from time import perf_counter
from typing import Any

from max_ray.benchmark.client import Client, Recording
from max_ray.benchmark.stream import parse

RESUMED_WITHIN_S = 120.0
_PAUSE_S = 0.1
_LAST_ID = re.compile(rb"^id: (\S+)$", re.MULTILINE)
_FINAL = ("http_404", "http_400")


async def post_resumable(client: Client, body: dict[str, Any], stream_id: str) -> tuple[Recording, int]:
    """Asks for a resumable stream, and reads it to its end over as many connections as that takes.

    Args:
        client: An open client.
        body: Of a completion that names its request.
        stream_id: What the stream is called.

    Returns:
        The events of all connections as one recording, and how often it was resumed. Where the server does not know
        the stream, the failure is the first one.
    """
    recording = await client.post("completions", body, perf_counter())
    first, num_resumed, deadline = parse(recording).failure, 0, perf_counter() + RESUMED_WITHIN_S
    while parse(recording).failure is not None and perf_counter() < deadline:
        keep_whole_events(recording)
        ids = _LAST_ID.findall(b"".join(recording.reads))
        last_id = ids[-1].decode() if ids else "0"
        num_before = len(recording.reads)
        await client.read_on(f"/v1/streams/{stream_id}?from={last_id}", recording)
        num_resumed += len(recording.reads) > num_before
        if recording.failure is not None and recording.failure.kind in _FINAL:
            recording.failure = first
            break
        if parse(recording).failure is not None:
            await asyncio.sleep(_PAUSE_S)
    return recording, num_resumed


def keep_whole_events(recording: Recording) -> None:
    """Drops what came of an event that is not complete, and an error at the end, which has no id."""
    read = b"".join(recording.reads)
    blocks = [block + b"\n\n" for block in read.split(b"\n\n")[:-1]]
    while blocks and not blocks[-1].startswith(b"id: "):
        blocks.pop()
    surplus = len(read) - sum(map(len, blocks))
    while surplus:
        last = recording.reads[-1]
        if len(last) > surplus:
            recording.reads[-1] = last[:-surplus]
            break
        surplus -= len(last)
        recording.reads.pop()
        recording.times.pop()
