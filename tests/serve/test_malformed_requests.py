"""Thousands of malformed and borderline requests to a served application: nothing but answers and our error objects."""

from __future__ import annotations

import asyncio
from collections import Counter

import psutil
import pytest

from tests.http.malformed import Generator
from tests.http.raw_requests import answered
from tests.serve.applications import replica_processes, text_of
from tests.serve.conftest import Served

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_REQUESTS = 20_000
NUM_SETTLED = 4_000
MAX_GROWTH = 8 << 20
CLIENTS = 8


async def test_twenty_thousand_malformed_requests(served: Served) -> None:
    """No status of 500 and above, an error object with each of 400 and above, and no memory kept."""
    (replica,) = replica_processes(served.app_name)
    before = await text_of(served, "x")
    generator = Generator(7, served.headers)
    statuses: Counter[int] = Counter()
    settled = await _memory_after(served, generator, replica, NUM_SETTLED, statuses)
    final = await _memory_after(served, generator, replica, NUM_REQUESTS - NUM_SETTLED, statuses)
    print(f"statuses {sorted(statuses.items())}; memory {settled >> 20} MiB, then {final >> 20} MiB")
    assert await text_of(served, "x") == before
    assert statuses[200] > 1000, "some are valid"
    assert final - settled <= MAX_GROWTH


async def _memory_after(
    served: Served, generator: Generator, replica: psutil.Process, number: int, statuses: Counter[int]
) -> int:
    """The replica's resident bytes after so many more requests."""
    requests = iter([generator.next() for _ in range(number)])

    async def client() -> None:
        for request in requests:
            statuses[await answered(served.port, request)] += 1

    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    await asyncio.sleep(2)
    return int(replica.memory_info().rss)
