"""Payloads of all messages but runs (`run_codec`): what they hold, and how they are read back.

    type           payload                                           sent by
    EXECUTE        a run: see `run_codec`                            replica
    EXTEND         more steps for a run                              replica
    INTERRUPT      int64: runs with this id and older ones end       replica
    STEP           run id and what one step gave                     worker, rank 0
    CACHE_UPDATE   number, and one scheduling decision's update      replica
    CACHE_REPLY    the same number, and the answer                   KV manager
    ERROR          kind and text of the error that ends the member   worker, KV manager
    PING, PONG     int64: a number, and the same number back         replica; member

Readers raise TransportError for everything that does not fit.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from max_ray.errors import MaxRayError, StaleLeaseError, TransportError, WorkerGroupError
from max_ray.interfaces import (
    BlockGrant,
    BlockRequest,
    CacheReply,
    CacheUpdate,
    LogProbabilities,
    RunExtension,
    StepOutput,
)
from max_ray.transport.arrays import FLOAT32, INT32, INT64, PayloadReader, PayloadWriter, text_bytes

NUM_CACHE_GROUPS = 1
"""Kinds of layers with block tables of their own."""
HASH_BYTES = 16

_NUMBER = struct.Struct("<q")
_STEP = struct.Struct("<qIB")  # run id, step, flags
_LAST = 1
_RARE_FLAGS = _LOGPROBS, _PROMPT_LOGPROBS, _EMBEDDINGS, _ERRORS_OF_ROWS = 2, 4, 8, 16
_IS_REGULAR = 32  # every row gained one token: no offsets follow
_REGULAR = np.arange(4097, dtype=np.int64)
_REGULAR.flags.writeable = False
_REGULAR_BYTES = _REGULAR.tobytes()
_EXTENSION = struct.Struct("<qIIB")  # run id, number, steps, cache groups
_UPDATE = struct.Struct("<qBIII")  # number, cache group, commits, releases, requests
_REPLY = struct.Struct("<qIIIqqq")  # number, grants, free blocks, blocks; hits, misses and evictions
_ERRORS: dict[str, type[MaxRayError]] = {"stale_lease": StaleLeaseError, "worker_group": WorkerGroupError}
_MAX_ERROR_CHARACTERS = 8000


def encode_number(number: int) -> bytes:
    """An INTERRUPT, PING or PONG."""
    return _NUMBER.pack(number)


def decode_number(payload: bytes) -> int:
    """See `encode_number`."""
    if len(payload) != _NUMBER.size:
        raise TransportError(f"A message of 8 bytes has {len(payload)}.")
    return int(_NUMBER.unpack(payload)[0])


def encode_error(error: BaseException) -> bytes:
    """The error that ended the sender's work."""
    kind = "stale_lease" if isinstance(error, StaleLeaseError) else "worker_group"
    text = str(error) if isinstance(error, MaxRayError) else f"A worker failed: {type(error).__name__}: {error}"
    writer = PayloadWriter()
    writer.texts([kind, text[:_MAX_ERROR_CHARACTERS]])
    return writer.bytes()


def decode_error(payload: bytes) -> MaxRayError:
    """StaleLeaseError or WorkerGroupError."""
    reader = PayloadReader(payload)
    kind, text = reader.texts(2)
    reader.finish()
    if kind not in _ERRORS:
        raise TransportError("A message has an error of an unknown kind.")
    return _ERRORS[kind](text)


def encode_step(run_id: int, output: StepOutput) -> bytes:
    """What one step of a run gave."""
    writer = PayloadWriter()
    rare = (output.log_probabilities, output.prompt_log_probabilities, output.embeddings, output.errors)
    flags = _LAST if output.last else 0
    for flag, part in zip(_RARE_FLAGS, rare, strict=True):
        flags |= 0 if part is None else flag
    offsets = output.indptr.tobytes()
    is_regular = offsets == _REGULAR_BYTES[: len(offsets)]
    writer.pack(_STEP, run_id, output.step, flags | _IS_REGULAR if is_regular else flags)
    writer.array(output.tokens)
    if not is_regular:
        writer.array(output.indptr)
    if flags > _LAST:
        _write_rare(writer, output)
    return writer.bytes()


def _write_rare(writer: PayloadWriter, output: StepOutput) -> None:
    if output.log_probabilities is not None:
        _write_entries(writer, output.log_probabilities)
    if output.prompt_log_probabilities is not None:
        _write_entries(writer, output.prompt_log_probabilities)
    if output.embeddings is not None:
        writer.array(np.asarray(output.embeddings, dtype=FLOAT32))
    if output.errors is not None:
        writer.counts(list(output.errors))
        writer.texts(list(output.errors.values()))


def decode_step(payload: bytes) -> tuple[int, StepOutput]:
    """(run id, what the step gave)."""
    reader = PayloadReader(payload)
    run_id, step, flags = reader.unpack(_STEP)
    tokens = reader.array(INT64)
    if flags & _IS_REGULAR and len(tokens) < len(_REGULAR):
        indptr = _REGULAR[: len(tokens) + 1]
    else:
        indptr = reader.array(INT64)
        if not len(indptr) or indptr[0] != 0 or indptr[-1] != len(tokens) or (indptr[1:] < indptr[:-1]).any():
            raise TransportError("A step has tokens that do not fit its rows.")
    output = StepOutput(step, tokens, indptr, bool(flags & _LAST))
    if flags & ~(_LAST | _IS_REGULAR):
        _read_rare(reader, output, flags)
    reader.finish()
    return run_id, output


def _read_rare(reader: PayloadReader, output: StepOutput, flags: int) -> None:
    num_rows = len(output.indptr) - 1
    if flags & _LOGPROBS:
        entries = _read_entries(reader, num_rows)
        present = {row: [entry for entry in found if entry is not None] for row, found in entries.items()}
        if any(len(found) != output.indptr[row + 1] - output.indptr[row] for row, found in present.items()):
            raise TransportError("A step has another number of log probabilities than of tokens.")
        output.log_probabilities = present
    if flags & _PROMPT_LOGPROBS:
        output.prompt_log_probabilities = _read_entries(reader, num_rows)
    if flags & _EMBEDDINGS:
        output.embeddings = reader.array(FLOAT32, 2)
        if len(output.embeddings) != num_rows:
            raise TransportError(f"A step has {len(output.embeddings)} vectors for {num_rows} rows.")
    if flags & _ERRORS_OF_ROWS:
        rows = reader.counts()
        output.errors = dict(zip(rows, reader.texts(len(rows)), strict=True))
        if not _are_rows(rows, num_rows):
            raise TransportError("A step has errors of rows that it has not.")


def _write_entries(writer: PayloadWriter, entries: Mapping[int, Sequence[LogProbabilities | None]]) -> None:
    """Entries of some rows, as columns; -1 alternatives stand for None."""
    flat = [entry for row in entries.values() for entry in row]
    present = [entry for entry in flat if entry is not None]
    writer.integers(list(entries))
    writer.counts([len(row) for row in entries.values()])
    writer.integers([-1 if entry is None else len(entry.top) for entry in flat])
    writer.integers([entry.token_id for entry in present])
    writer.floats([entry.log_probability for entry in present])
    writer.integers([token for entry in present for token, _ in entry.top])
    writer.floats([value for entry in present for _, value in entry.top])


def _read_entries(reader: PayloadReader, num_rows: int) -> dict[int, list[LogProbabilities | None]]:
    rows = reader.integers()
    lengths = reader.counts(len(rows))
    widths = reader.integers()
    num_present = sum(width >= 0 for width in widths)
    tokens, values = reader.integers(num_present), reader.floats(num_present)
    top_tokens = reader.integers()
    top_values = reader.floats(len(top_tokens))
    is_whole = sum(width for width in widths if width > 0) == len(top_tokens) and sum(lengths) == len(widths)
    if not is_whole or min(widths, default=0) < -1 or not _are_rows(rows, num_rows):
        raise TransportError("A step has log probabilities that do not fit its rows.")
    top = iter(zip(top_tokens, top_values, strict=True))
    chosen = iter(zip(tokens, values, strict=True))
    entries = iter([None if w < 0 else LogProbabilities(*next(chosen), [next(top) for _ in range(w)]) for w in widths])
    return {row: [next(entries) for _ in range(length)] for row, length in zip(rows, lengths, strict=True)}


def _are_rows(rows: Sequence[int], num_rows: int) -> bool:
    return len(set(rows)) == len(rows) and all(0 <= row < num_rows for row in rows)


def encode_extension(extension: RunExtension) -> bytes:
    """More steps for a run."""
    writer = PayloadWriter()
    writer.pack(_EXTENSION, extension.run_id, extension.number, extension.num_steps, NUM_CACHE_GROUPS)
    writer.array(extension.max_new_tokens)
    writer.integers(list(extension.block_tables))
    writer.ragged(list(extension.block_tables.values()), INT32)
    return writer.bytes()


def decode_extension(payload: bytes) -> RunExtension:
    """See `encode_extension`."""
    reader = PayloadReader(payload)
    run_id, number, num_steps, num_groups = reader.unpack(_EXTENSION)
    check_cache_groups(num_groups)
    max_new_tokens = reader.array(INT64)
    rows = reader.integers()
    tables = reader.ragged(INT32, len(rows))
    reader.finish()
    if not _are_rows(rows, len(max_new_tokens)):
        raise TransportError("An extension names rows that its run has not.")
    return RunExtension(run_id, number, num_steps, max_new_tokens, dict(zip(rows, tables, strict=True)))


def check_cache_groups(num_groups: int) -> None:
    """Raises TransportError for a number of cache groups that this version does not have."""
    if num_groups != NUM_CACHE_GROUPS:
        raise TransportError(f"A message has block tables of {num_groups} cache groups, {NUM_CACHE_GROUPS} are known.")


def encode_update(number: int, update: CacheUpdate) -> bytes:
    """One scheduling decision's update for the KV manager. `number` tells its reply from others."""
    writer = PayloadWriter()
    lengths = len(update.commits), len(update.releases), len(update.requests)
    writer.pack(_UPDATE, number, update.cache_group, *lengths)
    if update.commits:
        _write_named(writer, update.commits)
    if update.releases:
        writer.texts(update.releases)
    if update.requests:
        _write_named(
            writer, [(wanted.request_id, wanted.num_tokens, wanted.block_hashes) for wanted in update.requests]
        )
    return writer.bytes()


def decode_update(payload: bytes) -> tuple[int, CacheUpdate]:
    """(number, the update)."""
    reader = PayloadReader(payload)
    number, group, num_commits, num_releases, num_requests = reader.unpack(_UPDATE)
    if group >= NUM_CACHE_GROUPS:
        raise TransportError(f"A message is about cache group {group}, {NUM_CACHE_GROUPS} are known.")
    committed = _read_named(reader, num_commits) if num_commits else []
    releases = reader.texts(num_releases) if num_releases else []
    wanted = _read_named(reader, num_requests) if num_requests else []
    reader.finish()
    commits = [(name, first, hashes) for name, first, hashes in committed if hashes is not None and first >= 0]
    requests = [BlockRequest(*row) for row in wanted]
    if len(commits) < num_commits or any(request.num_tokens < 1 for request in requests):
        raise TransportError("An update has a block or a number of tokens that cannot be.")
    return number, CacheUpdate(commits, releases, requests, group)


def _write_named(writer: PayloadWriter, rows: Sequence[tuple[str, int, list[bytes] | None]]) -> None:
    """Rows of a request id, a number, and block hashes (-1 of them stand for None)."""
    names = [text_bytes(name) for name, _, _ in rows]
    lengths = [-1 if hashes is None else len(hashes) for _, _, hashes in rows]
    columns = zip(map(len, names), (number for _, number, _ in rows), lengths, strict=True)
    writer.integers([number for row in columns for number in row])
    writer.raw(b"".join(names))
    flat = [value for _, _, hashes in rows for value in hashes or ()]
    assert all(len(value) == HASH_BYTES for value in flat), "block hashes have 16 bytes"
    writer.raw(b"".join(flat))


def _read_named(reader: PayloadReader, count: int) -> list[tuple[str, int, list[bytes] | None]]:
    integers = reader.integers(3 * count)
    names, numbers, lengths = reader.split_texts(integers[::3]), integers[1::3], integers[2::3]
    data = reader.raw()
    if min(lengths) < -1 or sum(length for length in lengths if length > 0) * HASH_BYTES != len(data):
        raise TransportError("A message has block hashes that do not fit their requests.")
    hashes = iter([data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)])
    found = [None if length < 0 else list(islice(hashes, length)) for length in lengths]
    return list(zip(names, numbers, found, strict=True))


def encode_reply(number: int, reply: CacheReply) -> bytes:
    """The answer to update `number`."""
    writer = PayloadWriter()
    prefix_cache = reply.prefix_cache_hits, reply.prefix_cache_misses, reply.prefix_cache_evictions
    writer.pack(_REPLY, number, len(reply.grants), reply.num_free_blocks, reply.num_blocks, *prefix_cache)
    if reply.grants:
        names = list(map(text_bytes, reply.grants))
        grants = [_REFUSED if grant is None else grant for grant in reply.grants.values()]
        columns = zip(names, grants, strict=True)
        writer.integers([n for name, g in columns for n in (len(name), g.cached_tokens, len(g.block_ids))])
        writer.raw(b"".join(names))
        writer.joined([grant.block_ids for grant in grants], INT32)
    return writer.bytes()


def decode_reply(payload: bytes) -> tuple[int, CacheReply]:
    """(number of the update, the answer)."""
    reader = PayloadReader(payload)
    number, num_grants, num_free_blocks, num_blocks, *prefix_cache = reader.unpack(_REPLY)
    grants = _read_grants(reader, num_grants) if num_grants else {}
    reader.finish()
    if num_free_blocks > num_blocks:
        raise TransportError("A reply has more free blocks than blocks.")
    return number, CacheReply(grants, num_free_blocks, num_blocks, *prefix_cache)


def _read_grants(reader: PayloadReader, count: int) -> dict[str, BlockGrant | None]:
    integers = reader.integers(3 * count)
    names, cached = reader.split_texts(integers[::3]), integers[1::3]
    blocks = reader.split(INT32, integers[2::3])
    if len(set(names)) != count or min(cached) < _REFUSED.cached_tokens:
        raise TransportError("A reply has grants that cannot be.")
    columns = zip(names, cached, blocks, strict=True)
    return {name: None if tokens < 0 else BlockGrant(ids, tokens) for name, tokens, ids in columns}


_REFUSED = BlockGrant(np.empty(0, dtype=np.int32), -1)
