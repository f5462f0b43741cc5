"""Messages come out as they went in; what does not fit is a TransportError and costs no memory."""

from __future__ import annotations

import pickle
import random
import struct
import tracemalloc
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from max_ray.errors import MaxRayError, StaleLeaseError, TransportError, WorkerGroupError
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
from max_ray.transport.arrays import PayloadReader, PayloadWriter
from max_ray.transport.frames import MessageType
from tests.transport import messages
from tests.transport.messages import DECODERS, MAKERS, plain

MIB = 2**20


@pytest.mark.parametrize("seed", range(30))
def test_runs_come_out_as_they_went_in(seed: int) -> None:
    request = messages.run_request(random.Random(seed))
    assert plain(run_codec.decode_run(run_codec.encode_run(request))) == plain(request)


@pytest.mark.parametrize("seed", range(30))
def test_other_messages_come_out_as_they_went_in(seed: int) -> None:
    rng = random.Random(seed)
    extension, output = messages.extension(rng), messages.step_output(rng)
    update, reply = messages.cache_update(rng), messages.cache_reply(rng)
    assert plain(codec.decode_extension(codec.encode_extension(extension))) == plain(extension)
    assert plain(codec.decode_step(codec.encode_step(7, output))) == plain((7, output))
    assert plain(codec.decode_update(codec.encode_update(8, update))) == plain((8, update))
    assert plain(codec.decode_reply(codec.encode_reply(9, reply))) == plain((9, reply))
    assert codec.decode_number(codec.encode_number(-(2**63))) == -(2**63)


def test_every_field_travels() -> None:
    """A field that is added to a message needs its place in the codec and in these random messages."""
    assert {f.name for f in fields(RunRequest)} == {"run_id", "rows", "num_steps"}
    assert {f.name for f in fields(RunRow)} == {
        *("request_id", "active_tokens", "processed_length", "block_table", "max_new_tokens", "sampling_params"),
        *("stop_ids", "generated_length", "prompt_length", "history", "log_probabilities", "echo", "echo_next"),
        *("images", "position_offset"),
    }
    assert {f.name for f in fields(SamplingParams)} == {
        *("top_k", "top_p", "min_p", "temperature", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("max_new_tokens", "min_new_tokens", "ignore_eos", "stop", "stop_token_ids", "seed", "structured_output"),
        "logit_controls",
    }
    assert {f.name for f in fields(LogitControls)} == {
        *("logit_bias", "allowed_token_ids", "bad_words", "repeat_last_n", "typical_p", "xtc_probability"),
        *("xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_breakers"),
    }
    assert {f.name for f in fields(StepOutput)} == {
        *("step", "tokens", "indptr", "last", "log_probabilities", "prompt_log_probabilities", "embeddings", "errors"),
    }


def test_every_field_of_cache_messages_travels() -> None:
    assert {f.name for f in fields(CacheUpdate)} == {"commits", "releases", "requests", "cache_group"}
    assert {f.name for f in fields(BlockRequest)} == {"request_id", "num_tokens", "block_hashes"}
    assert {f.name for f in fields(BlockGrant)} == {"block_ids", "cached_tokens"}
    assert {f.name for f in fields(CacheReply)} == {
        *("grants", "num_free_blocks", "num_blocks"),
        *("prefix_cache_hits", "prefix_cache_misses", "prefix_cache_evictions"),
    }
    assert {f.name for f in fields(GrammarSpec)} == {"kind", "text", "whitespace"}
    assert {f.name for f in fields(PromptImage)} == {
        *("pixels", "scale", "shift", "start", "rows", "columns", "digest"),
    }
    assert {f.name for f in fields(LogProbabilities)} == {"token_id", "log_probability", "top"}
    assert {f.name for f in fields(RunExtension)} == {
        *("run_id", "number", "num_steps", "max_new_tokens", "block_tables"),
    }


def test_huge_limits_of_a_client_fit() -> None:
    row = messages.run_row(random.Random(0), "a")
    row.sampling_params = SamplingParams(top_k=10**30, max_new_tokens=10**30, seed=1)
    params = run_codec.decode_run(run_codec.encode_run(RunRequest(1, [row], 1))).rows[0].sampling_params
    assert params.top_k >= 2**31
    assert params.max_new_tokens is not None
    assert params.max_new_tokens >= 2**31


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (StaleLeaseError("passed on"), StaleLeaseError, "passed on"),
        (WorkerGroupError("out of luck"), WorkerGroupError, "out of luck"),
        (ZeroDivisionError("by 0"), WorkerGroupError, "A worker failed: ZeroDivisionError: by 0"),
    ],
)
def test_errors_keep_their_kind(error: Exception, kind: type[MaxRayError], text: str) -> None:
    found = codec.decode_error(codec.encode_error(error))
    assert (type(found), str(found)) == (kind, text)


def test_arrays_that_come_out_can_be_written_and_are_aligned() -> None:
    request = run_codec.decode_run(run_codec.encode_run(messages.run_request(random.Random(3), 9)))
    for row in request.rows:
        assert row.active_tokens.flags.writeable
        assert row.active_tokens.flags.aligned
        assert row.block_table.flags.aligned
    _, output = codec.decode_step(codec.encode_step(1, StepOutput(0, np.arange(3), np.arange(4), False)))
    assert output.tokens.flags.writeable


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<BBI", 2, 1, 2**32 - 1),
        struct.pack("<BBI", 2, 1, 1) + b"1234567",
        struct.pack("<BBI", 99, 1, 0),
        struct.pack("<BBII", 2, 2, 1, 1) + bytes(8),
        struct.pack("<BBI", 1, 1, 1) + bytes(4),
    ],
)
def test_an_array_that_does_not_fit(data: bytes) -> None:
    with pytest.raises(TransportError):
        PayloadReader(data).view(np.dtype(np.int64))


def test_an_array_without_values_has_no_absurd_shape() -> None:
    data = struct.pack("<BBIII", 0, 3, 0, 2**32 - 1, 2**32 - 1)
    with pytest.raises(TransportError, match="without values"):
        PayloadReader(data).view(np.dtype(np.uint8), 3)
    writer = PayloadWriter()
    writer.array(np.empty((12, 0)))
    assert PayloadReader(writer.bytes()).view(np.dtype(np.float64), 2).shape == (12, 0)


def mutated(rng: random.Random, payload: bytes) -> bytes:
    """A payload with flipped bits, cut, extended, or with a length in it replaced."""
    data = bytearray(payload)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        return bytes(data) + rng.randbytes(rng.randint(1, 40))
    if kind == 2 and len(data) >= 4:
        place = rng.randrange(len(data) - 3)
        data[place : place + 4] = struct.pack("<I", rng.choice([2**32 - 1, 2**31, 2**31 - 1, 2**16, 0, 1, 257]))
        return bytes(data)
    if kind == 3:
        start = rng.randrange(len(data))
        del data[start : start + rng.randint(1, 16)]
        return bytes(data)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def outcome_of(kind: MessageType, payload: bytes) -> str:
    """Any other exception than TransportError goes up to the test."""
    try:
        DECODERS[kind](payload)
    except TransportError:
        return "refused"
    return "read"


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(MessageType), ids=lambda kind: kind.name)
def test_mutated_payloads_are_refused_or_harmless(kind: MessageType, count: int) -> None:
    """As from a peer that knows the keys."""
    rng = random.Random(int(kind))
    originals = [MAKERS[kind](rng) for _ in range(40)]
    assert all(outcome_of(kind, payload) == "read" for payload in originals)
    tracemalloc.start()
    try:
        seen = [outcome_of(kind, mutated(rng, originals[i % len(originals)])) for i in range(count)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen.count("refused") > count // 4
    assert peak < 10 * MIB, f"{peak / MIB:.1f} MiB at most at one time"


class _Runs:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("kind", list(MessageType), ids=lambda kind: kind.name)
def test_a_pickle_is_only_bytes(kind: MessageType, tmp_path: Path) -> None:
    target = tmp_path / "written"
    data = pickle.dumps(_Runs(str(target)))
    with pytest.raises(TransportError):
        DECODERS[kind](data)
    assert not target.exists()
    pickle.loads(data).close()
    assert target.exists(), "else this would prove nothing"
