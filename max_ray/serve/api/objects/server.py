"""Answers of the routes about the server itself."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from max_ray.serve.api.objects.openai import UsageObject


class Health(TypedDict):
    """The server answers."""

    status: Literal["ok"]


class Version(TypedDict):
    """The version of the server."""

    version: str


class ChoiceRecord(TypedDict):
    """What happened to one choice. A phase that is not over is null."""

    index: int
    finish_reason: str | None
    completion_tokens: int
    cached_tokens: int
    wait_reason: str | None
    preemptions: int
    kv_blocks: int
    prepare_ms: float | None
    queue_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None


class RequestObject(TypedDict):
    """What happened to a request."""

    id: str
    object: Literal["request"]
    status: Literal["done", "in_progress"]
    key: str | None
    replica: str
    created: float
    total_ms: float
    usage: UsageObject
    choices: list[ChoiceRecord]


class Quantiles(TypedDict):
    """Of a distribution, in seconds."""

    count: int
    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None


class Latency(TypedDict):
    """Of all replicas and routes, since their start."""

    time_to_first_token_seconds: Quantiles
    inter_token_latency_seconds: Quantiles


class KVCacheMap(TypedDict):
    """KV blocks in cells of neighbouring ones: those in use, those shared, and the request with the most (-1: none)."""

    page_size: int
    num_blocks: int
    blocks_per_cell: int
    used: list[int]
    shared: list[int]
    request: list[int]


class ActiveRequest(TypedDict):
    """A request that runs or waits."""

    index: int
    tag: str
    phase: Literal["queued", "preempted", "prefill", "decode"]
    age_s: float
    prompt_tokens: int
    cached_tokens: int
    processed_tokens: int
    generated_tokens: int
    num_blocks: int


class ServedModel(TypedDict):
    """The served model."""

    id: str
    task: str
    max_model_len: int
    family: str
    format: str
    encoding: str
    size_bytes: int
    is_on_gpu: bool


class ServerObject(TypedDict):
    """The running server. `limits` and `replicas` have the scheduler's own numbers."""

    object: Literal["server"]
    version: str
    time: float
    uptime_s: float
    model: ServedModel
    limits: dict[str, int | bool | None]
    replica: str
    replicas: list[dict[str, Any]]
    latency: Latency
    kv_cache: KVCacheMap | None
    requests: list[ActiveRequest]
    num_requests: int


class FrontServer(TypedDict):
    """The running server of several models. A model has what `/v1/server` tells of one."""

    object: Literal["server"]
    version: str
    time: float
    uptime_s: float
    models: list[dict[str, Any]]
