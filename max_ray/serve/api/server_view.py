"""The object of `GET /v1/server`: the running server at one moment, for people, dashboards and the page at `/`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from max_ray import __version__
from max_ray.interfaces import PipelineTask
from max_ray.scheduler import Histogram, LoopActivity, RequestActivity
from max_ray.serve.api.api_context import ApiContext
from max_ray.serve.api.metrics import MetricsSnapshot, merged
from max_ray.serve.api.objects.server import ActiveRequest, KVCacheMap, Latency, Quantiles, ServerObject

MAX_CELLS = 512
"""Of the map of KV blocks."""
MAX_REQUESTS = 256
"""That are listed; the others are counted."""


async def server_object(context: ApiContext, started: float) -> ServerObject:
    """The running server. Requests and KV blocks are those of the replica that answers; counters are of all replicas.

    Args:
        context: Of the application.
        started: When this replica began to serve, in monotonic seconds.
    """
    engine = context.engine
    snapshots = await engine.metrics_snapshots()
    activity = engine.activity
    return {
        "object": "server",
        "version": __version__,
        "time": time.time(),
        "uptime_s": time.monotonic() - started,
        "model": {
            "id": engine.model_name,
            "task": engine.task.value,
            "max_model_len": engine.tokenizer.max_length,
            "family": context.details.family,
            "format": context.details.format,
            "encoding": context.details.encoding,
            "size_bytes": context.details.size_bytes,
            "is_on_gpu": context.details.is_on_gpu,
        },
        "limits": asdict(activity.limits),
        "replica": snapshots[0].replica,
        "replicas": [_replica(snapshot) for snapshot in snapshots],
        "latency": _latency(snapshots),
        "kv_cache": _kv_cache(activity) if engine.task is PipelineTask.TEXT_GENERATION else None,
        "requests": [_request(number, one) for number, one in enumerate(activity.requests[:MAX_REQUESTS])],
        "num_requests": len(activity.requests),
    }


def _replica(snapshot: MetricsSnapshot) -> dict[str, Any]:
    """Tokens as the routes count them, which for embeddings is what the loop takes in."""
    return {
        "replica": snapshot.replica,
        **snapshot.stats.counts(),
        "prompt_tokens": snapshot.prompt_tokens,
        "generated_tokens": snapshot.generated_tokens,
        "group": None if snapshot.group is None else asdict(snapshot.group),
    }


def _latency(snapshots: Sequence[MetricsSnapshot]) -> Latency:
    """Of all replicas and routes, since their start."""
    counts = [of_route for snapshot in snapshots for of_route in snapshot.routes.values()]
    return {
        "time_to_first_token_seconds": _quantiles(merged(one.time_to_first_token for one in counts)),
        "inter_token_latency_seconds": _quantiles(merged(one.inter_token_latency for one in counts)),
    }


def _quantiles(histogram: Histogram | None) -> Quantiles:
    if histogram is None:
        return {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None}
    mean = histogram.total / histogram.count if histogram.count else None
    return {
        "count": histogram.count,
        "mean": mean,
        "p50": histogram.quantile(0.5),
        "p95": histogram.quantile(0.95),
        "p99": histogram.quantile(0.99),
    }


def _request(number: int, request: RequestActivity) -> ActiveRequest:
    return {
        "index": number,
        "tag": _tag(request),
        "phase": request.phase,
        "age_s": request.age_s,
        "prompt_tokens": request.prompt_tokens,
        "cached_tokens": request.cached_tokens,
        "processed_tokens": request.processed_tokens,
        "generated_tokens": request.generated_tokens,
        "num_blocks": len(request.blocks),
    }


def _tag(request: RequestActivity) -> str:
    """Tells requests apart and does not give an id away: by its id a response can be read."""
    return hashlib.blake2b(str(request.request_id).encode(), digest_size=4).hexdigest()


def _kv_cache(activity: LoopActivity) -> KVCacheMap:
    num_blocks = activity.num_blocks
    per_cell = max(1, -(-num_blocks // MAX_CELLS))
    used, shared, owner = block_map([one.blocks for one in activity.requests[:MAX_REQUESTS]], num_blocks, per_cell)
    return {
        "page_size": activity.page_size,
        "num_blocks": num_blocks,
        "blocks_per_cell": per_cell,
        "used": used.tolist(),
        "shared": shared.tolist(),
        "request": owner.tolist(),
    }


def block_map(
    tables: Sequence[npt.NDArray[np.int32]], num_blocks: int, per_cell: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Who holds the KV blocks, in cells of `per_cell` neighbouring blocks.

    Args:
        tables: Block ids of each request. Those beyond the cache, of one that is being replaced, are left out.
        num_blocks: Blocks of the cache.
        per_cell: Blocks of a cell; the last one may have fewer.

    Returns:
        By cell: blocks in use, blocks that several requests share, and the index of the request with the most blocks
        in it (the first of equals; -1 for none).
    """
    num_cells = -(-num_blocks // per_cell)
    holders = np.zeros(num_blocks, dtype=np.int64)
    most = np.zeros(num_cells, dtype=np.int64)
    owner = np.full(num_cells, -1, dtype=np.int64)
    for index, table in enumerate(tables):
        blocks = table[table < num_blocks]
        holders[blocks] += 1
        counts = np.bincount(blocks // per_cell, minlength=num_cells)
        owner[counts > most] = index
        np.maximum(most, counts, out=most)
    starts = np.arange(0, num_blocks, per_cell)
    if not num_cells:
        return most, most, owner
    used = np.add.reduceat((holders > 0).astype(np.int64), starts)
    return used, np.add.reduceat((holders > 1).astype(np.int64), starts), owner
