"""One benchmark of a server: build the data, warm up, send the load, parse, report."""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from math import inf
from time import perf_counter

import uvloop

from max_ray.benchmark.client import ENDPOINTS, Client, Recording, normal_url
from max_ray.benchmark.datasets import Conversation, DataSettings, build_dataset
from max_ray.benchmark.load import Load, Pace, RequestSettings
from max_ray.benchmark.metrics import SCHEMA, ClientCost, Report, summarize
from max_ray.benchmark.progress import Progress
from max_ray.benchmark.stream import parse
from max_ray.benchmark.words import CommonWords, TokenizerWords, Words
from max_ray.errors import ConfigError, MaxRayError


@dataclass(frozen=True)
class ServingSettings:
    """Everything that a run depends on, all of it written into the report but the key.

    model: None takes the first that the server lists. tokenizer: a model folder; None counts a word as a token.
    goodput: milliseconds by metric. Raises ConfigError for values out of range.
    """

    base_url: str
    data: DataSettings
    pace: Pace
    model: str | None = None
    endpoint: str = "completions"
    tokenizer: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = False
    num_warmups: int = 1
    timeout_s: float = 600.0
    goodput: Mapping[str, float] = field(default_factory=dict)
    label: str | None = None

    def __post_init__(self) -> None:
        normal_url(self.base_url)
        if self.endpoint not in ENDPOINTS:
            raise ConfigError(f"--endpoint must be one of {', '.join(ENDPOINTS)}, not {self.endpoint!r}.")
        if not 0 <= self.temperature < inf:
            raise ConfigError(f"--temperature must be at least 0, not {self.temperature}.")
        if self.num_warmups < 0:
            raise ConfigError(f"--num-warmups must be at least 0, not {self.num_warmups}.")
        if not 0 < self.timeout_s < inf:
            raise ConfigError(f"--timeout must be more than 0 seconds, not {self.timeout_s}.")


def run(settings: ServingSettings, api_key: str | None = None) -> Report:
    """Measures, blocking. Raises ConfigError for data that cannot be made, MaxRayError when a warm-up request fails."""
    words = build_words(settings)
    conversations = build_dataset(settings.data, words)
    warmups = _warmups(settings, words)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(settings, conversations, warmups, api_key))


def build_words(settings: ServingSettings) -> Words:
    if settings.tokenizer is None:
        return CommonWords()
    return TokenizerWords(settings.tokenizer, with_special_tokens=settings.endpoint == "completions")


def _warmups(settings: ServingSettings, words: Words) -> list[Conversation]:
    """Requests of the same shape but other text, so that no prefix cache knows the measured ones."""
    if not settings.num_warmups:
        return []
    if settings.data.dataset == "sharegpt":
        shape = DataSettings(num_prompts=settings.num_warmups, seed=settings.data.seed)
    else:
        shape = replace(settings.data, num_prompts=settings.num_warmups)
    return [conversation[:1] for conversation in build_dataset(shape, words, purpose="warm-up")]


async def measure(
    settings: ServingSettings,
    conversations: Sequence[Conversation],
    warmups: Sequence[Conversation] = (),
    api_key: str | None = None,
) -> Report:
    """Sends `warmups`, then the measured load."""
    async with Client(settings.base_url, api_key=api_key, timeout_s=settings.timeout_s) as client:
        model = settings.model or await client.first_model()
        settings = replace(settings, model=model, label=settings.label or f"{model} at {client.base_url}")
        requests = RequestSettings(
            settings.endpoint, model, settings.temperature, settings.ignore_eos, settings.data.seed
        )
        await _warm_up(client, requests, warmups, settings.pace.max_concurrency or 1)
        progress = Progress(sum(map(len, conversations)))
        load = Load(client, requests, progress.note)
        try:
            with _no_garbage_collection():
                before, begin = _cpu_seconds(), perf_counter()
                recordings = await load.run(conversations, settings.pace)
                cpu_s = _cpu_seconds() - before
        finally:
            progress.close()
    return _report(settings, recordings, begin, cpu_s)


async def _warm_up(
    client: Client, requests: RequestSettings, warmups: Sequence[Conversation], concurrency: int
) -> None:
    recordings = await Load(client, requests).run(warmups, Pace(max_concurrency=concurrency)) if warmups else []
    for recording in recordings:
        failure = parse(recording).failure
        if failure is not None:
            raise MaxRayError(f"A warm-up request failed ({failure.kind}): {failure.message}")


def _report(settings: ServingSettings, recordings: Sequence[Recording], begin: float, cpu_s: float) -> Report:
    cost = ClientCost(cpu_s, sum(len(recording.reads) for recording in recordings))
    duration_s = max(recording.end for recording in recordings) - begin
    measured = summarize([parse(recording) for recording in recordings], duration_s, cost, settings.goodput)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    values = asdict(settings)
    if settings.pace.request_rate == inf:
        values["pace"]["request_rate"] = "inf"  # JSON has no such number
    return {"schema": SCHEMA, "label": values.pop("label"), "date": date, "settings": values, **measured}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection over thousands of recorded reads would stop the client for longer than a token takes."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
