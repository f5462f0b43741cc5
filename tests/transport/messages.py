"""Random messages of every type, and what compares them."""

from __future__ import annotations

import math
import random
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from max_ray.interfaces import (
    BlockGrant,
    BlockRequest,
    CacheReply,
    CacheUpdate,
    GrammarSpec,
    LogitControls,
    LogProbabilities,
    PromptImage,
    RunExtension,
    RunRequest,
    RunRow,
    SamplingParams,
    StepOutput,
)
from max_ray.transport import codec, run_codec
from max_ray.transport.frames import MessageType


def sampling_params(rng: random.Random) -> SamplingParams:
    grammar = rng.choice([None, None, GrammarSpec("json_schema", '{"type": "object"}', "flexible")])
    return SamplingParams(
        structured_output=grammar,
        logit_controls=rng.choice([None, None, logit_controls(rng)]),
        top_k=rng.choice([-1, 0, 1, 50]),
        top_p=rng.choice([1.0, 0.9, 1e-9]),
        min_p=rng.random(),
        temperature=rng.choice([0.0, 1.0, 0.7]),
        frequency_penalty=rng.uniform(-2, 2),
        presence_penalty=rng.uniform(-2, 2),
        repetition_penalty=rng.uniform(0.1, 3),
        max_new_tokens=rng.choice([None, 1, 2**31]),
        min_new_tokens=0 if grammar else rng.choice([0, 2**31 - 1]),
        ignore_eos=not grammar and rng.random() < 0.5,
        stop=rng.choice([(), ("a", "\udc80é", "")]),
        stop_token_ids=rng.choice([(), (1, 2**31)]),
        seed=rng.choice([0, 1, -(2**63), 2**63, 2**64 - 1, 2**63 - 1, -1, rng.getrandbits(32)]),
    )


def logit_controls(rng: random.Random) -> LogitControls:
    def sequences() -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(rng.sample(range(2**31), rng.randint(1, 5))) for _ in range(rng.randint(0, 4)))

    return LogitControls(
        logit_bias=tuple((rng.getrandbits(31), rng.choice([-math.inf, rng.uniform(-100, 100)])) for _ in range(3)),
        allowed_token_ids=rng.choice([None, tuple(rng.sample(range(99), rng.randint(1, 9)))]),
        bad_words=sequences(),
        repeat_last_n=rng.choice([-1, 0, 64]),
        typical_p=rng.uniform(0.01, 1),
        xtc_probability=rng.random(),
        xtc_threshold=rng.random(),
        dry_multiplier=rng.choice([0.0, 0.8]),
        dry_base=rng.uniform(1, 3),
        dry_allowed_length=rng.randint(1, 9),
        dry_penalty_last_n=rng.choice([-1, 0, 500]),
        dry_breakers=sequences(),
    )


def image(rng: random.Random) -> PromptImage:
    height, width = rng.randint(1, 9), rng.randint(1, 9)
    numbers = np.random.default_rng(rng.getrandbits(32))
    return PromptImage(
        pixels=numbers.integers(0, 256, (height, width, 3), dtype=np.uint8),
        scale=numbers.random(3, dtype=np.float32),
        shift=numbers.random(3, dtype=np.float32),
        start=rng.randint(0, 2**20),
        rows=rng.randint(1, 9),
        columns=rng.randint(1, 9),
        digest=rng.randbytes(16),
    )


def run_row(rng: random.Random, name: str) -> RunRow:
    num_active = rng.choice([1, 1, 1, 7, 300])
    return RunRow(
        request_id=name,
        active_tokens=np.array([rng.getrandbits(31) for _ in range(num_active)], dtype=np.int64),
        processed_length=rng.randint(0, 2**20),
        block_table=np.array([rng.getrandbits(30) for _ in range(rng.randint(0, 40))], dtype=np.int32),
        max_new_tokens=rng.randint(0, 40),
        sampling_params=sampling_params(rng),
        stop_ids=frozenset(rng.sample(range(100_000), rng.randint(0, 3))),
        generated_length=rng.randint(0, 2**20),
        prompt_length=rng.randint(0, 2**20),
        history=rng.choice([None, np.arange(rng.randint(0, 50), dtype=np.int64)]),
        log_probabilities=rng.choice([None, 0, 20]),
        echo=rng.random() < 0.5,
        echo_next=rng.choice([-1, 0, 5]),
        images=tuple(image(rng) for _ in range(rng.choice([0, 0, 0, 2]))),
        position_offset=rng.randint(-100, 0),
    )


def run_request(rng: random.Random, num_rows: int | None = None) -> RunRequest:
    count = rng.choice([0, 1, 2, 9]) if num_rows is None else num_rows
    return RunRequest(rng.getrandbits(62), [run_row(rng, f"r{i}é") for i in range(count)], rng.randint(1, 2**31))


def extension(rng: random.Random) -> RunExtension:
    num_rows = rng.randint(0, 9)
    tables = {i: np.arange(rng.randint(0, 30), dtype=np.int32) for i in range(num_rows) if rng.random() < 0.5}
    return RunExtension(rng.getrandbits(62), rng.randint(1, 99), 64, np.arange(num_rows, dtype=np.int64), tables)


def _entry(rng: random.Random) -> LogProbabilities:
    top = [(rng.getrandbits(17), -rng.random()) for _ in range(rng.randint(0, 4))]
    return LogProbabilities(rng.getrandbits(17), -rng.random() * 1e-9, top)


def step_output(rng: random.Random) -> StepOutput:
    """Ragged: rows gain 0 to 3 tokens."""
    num_rows = rng.choice([0, 1, 3, 32])
    counts = [rng.choice([0, 1, 1, 3]) for _ in range(num_rows)]
    indptr = np.cumsum([0, *counts], dtype=np.int64)
    output = StepOutput(rng.getrandbits(31), np.arange(indptr[-1], dtype=np.int64), indptr, rng.random() < 0.5)
    rows = [i for i in range(num_rows) if rng.random() < 0.5]
    if rng.random() < 0.5:
        output.log_probabilities = {i: [_entry(rng) for _ in range(counts[i])] for i in rows}
    if rng.random() < 0.5:
        output.prompt_log_probabilities = {i: [None, *[_entry(rng) for _ in range(rng.randint(0, 3))]] for i in rows}
    if rng.random() < 0.3:
        output.embeddings = np.random.default_rng(1).random((num_rows, 5), dtype=np.float32)
    if rng.random() < 0.3:
        output.errors = {i: f"row {i} é" for i in rows}
    return output


def cache_update(rng: random.Random) -> CacheUpdate:
    def hashes() -> list[bytes]:
        return [rng.randbytes(16) for _ in range(rng.randint(0, 4))]

    commits = [(f"c{i}", rng.randint(0, 99), hashes()) for i in range(rng.randint(0, 3))]
    releases = [f"d{i}" for i in range(rng.randint(0, 3))]
    wanted = [
        BlockRequest(f"w{i}", rng.randint(1, 9999), rng.choice([None, hashes()])) for i in range(rng.randint(0, 3))
    ]
    return CacheUpdate(commits, releases, wanted)


def cache_reply(rng: random.Random) -> CacheReply:
    grants = {
        f"w{i}": rng.choice([None, BlockGrant(np.arange(rng.randint(0, 9), dtype=np.int32), 16 * rng.randint(0, 9))])
        for i in range(rng.randint(0, 4))
    }
    return CacheReply(grants, rng.randint(0, 50), 50, *(rng.getrandbits(40) for _ in range(3)))


MAKERS: dict[MessageType, Any] = {
    MessageType.EXECUTE: lambda rng: run_codec.encode_run(run_request(rng)),
    MessageType.EXTEND: lambda rng: codec.encode_extension(extension(rng)),
    MessageType.INTERRUPT: lambda rng: codec.encode_number(rng.getrandbits(40)),
    MessageType.STEP: lambda rng: codec.encode_step(rng.getrandbits(40), step_output(rng)),
    MessageType.CACHE_UPDATE: lambda rng: codec.encode_update(rng.getrandbits(40), cache_update(rng)),
    MessageType.CACHE_REPLY: lambda rng: codec.encode_reply(rng.getrandbits(40), cache_reply(rng)),
    MessageType.ERROR: lambda rng: codec.encode_error(RuntimeError("x" * rng.randint(0, 99))),
    MessageType.PING: lambda rng: codec.encode_number(rng.getrandbits(40)),
    MessageType.PONG: lambda rng: codec.encode_number(rng.getrandbits(40)),
}
"""A random payload of each type."""

DECODERS: dict[MessageType, Any] = {
    MessageType.EXECUTE: run_codec.decode_run,
    MessageType.EXTEND: codec.decode_extension,
    MessageType.INTERRUPT: codec.decode_number,
    MessageType.STEP: codec.decode_step,
    MessageType.CACHE_UPDATE: codec.decode_update,
    MessageType.CACHE_REPLY: codec.decode_reply,
    MessageType.ERROR: codec.decode_error,
    MessageType.PING: codec.decode_number,
    MessageType.PONG: codec.decode_number,
}


def plain(value: Any) -> Any:
    """Values that compare by ==: arrays with their dtypes, dataclasses field by field."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
