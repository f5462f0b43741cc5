"""The payload of a run: tables of numbers, and ragged columns for what has different lengths.

    header         run id, steps, rows, cache groups, sets of stop ids, histories, stop texts, images,
                   grammars, logit controls
    records        22 numbers a row: lengths of what follows, limits, and sampling parameters
    joined         request ids; active tokens; a block table a row, for each cache group
    sets           the different sets of stop ids
    rare           histories, stop texts, images, grammars, logit controls: only for the rows that have any

Every field of RunRow and SamplingParams has its place here; a test compares the lists.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from max_ray.errors import InputError, TransportError
from max_ray.interfaces import GrammarSpec, PromptImage, RunRequest, RunRow, SamplingParams
from max_ray.interfaces.grammar import GrammarKind, Whitespace
from max_ray.transport.arrays import FLOAT32, INT32, INT64, UINT8, PayloadReader, PayloadWriter, text_bytes
from max_ray.transport.codec import NUM_CACHE_GROUPS, check_cache_groups
from max_ray.transport.logit_controls_codec import read_logit_controls, write_logit_controls

_HEADER = struct.Struct("<qIIBIIIIII")
_KINDS: dict[str, GrammarKind] = {kind: kind for kind in get_args(GrammarKind)}
_WHITESPACES: dict[str, Whitespace] = {kind: kind for kind in get_args(Whitespace)}
_NONE = -1  # no alternatives to report; no limit of new tokens
_MAX_INTEGER = 2**62  # limits beyond it are none
_BITS_64 = 2**64
_SIGN_64 = 2**63
_ECHO, _IGNORE_EOS, _UNSIGNED_SEED = 1, 2, 4
_OF_SAMPLING = _IGNORE_EOS | _UNSIGNED_SEED
_RECORD = struct.Struct("<16q6d")
"""The numbers of one row: lengths of its texts and arrays, limits, sampling parameters."""


def encode_run(request: RunRequest) -> bytes:
    """A run for all ranks."""
    rows = request.rows
    writer = PayloadWriter()
    names = [text_bytes(row.request_id) for row in rows]
    sets: dict[frozenset[int], int] = {}  # most rows have the same stop ids: each different set is sent once
    which = [sets.setdefault(row.stop_ids, len(sets)) for row in rows]
    rare = _Rare.of(rows)
    writer.pack(_HEADER, request.run_id, request.num_steps, len(rows), NUM_CACHE_GROUPS, len(sets), *rare)
    writer.raw(b"".join([_record(*columns) for columns in zip(rows, names, which, strict=True)]))
    writer.raw(b"".join(names))
    writer.joined([row.active_tokens for row in rows], INT64)
    writer.joined([row.block_table for row in rows], INT32)
    writer.integers([number for found in sets for number in (len(found), *found)])
    if any(rare):
        rare.write(writer, rows)
    return writer.bytes()


def decode_run(payload: bytes) -> RunRequest:
    """See `encode_run`. Raises TransportError for what does not fit, wrong sampling parameters included."""
    reader = PayloadReader(payload)
    run_id, num_steps, num_rows, num_groups, num_sets, *rare = reader.unpack(_HEADER)
    check_cache_groups(num_groups)
    data = reader.raw()
    if len(data) != num_rows * _RECORD.size:
        raise TransportError(f"A run has {len(data)} bytes of numbers for {num_rows} rows.")
    records = list(_RECORD.iter_unpack(data))
    names = reader.split_texts([record[0] for record in records])
    active = reader.split(INT64, [record[1] for record in records])
    tables = reader.split(INT32, [record[2] for record in records])
    sets = _sets(reader.integers(), num_sets)
    try:
        rows = [_row(*columns, sets) for columns in zip(records, names, active, tables, strict=True)]
        if any(rare):
            _Rare(*rare).read(reader, rows)
    except InputError as error:
        raise TransportError(f"A run has wrong sampling parameters: {error}") from None
    reader.finish()
    return RunRequest(run_id, rows, num_steps)


def _record(row: RunRow, name: bytes, stops: int) -> bytes:
    params = row.sampling_params
    flags = (_ECHO if row.echo else 0) | (_IGNORE_EOS if params.ignore_eos else 0)
    if params.seed >= _SIGN_64:
        flags |= _UNSIGNED_SEED
    return _RECORD.pack(
        len(name),
        len(row.active_tokens),
        len(row.block_table),
        stops,
        flags,
        row.processed_length,
        row.max_new_tokens,
        row.generated_length,
        row.prompt_length,
        _NONE if row.log_probabilities is None else row.log_probabilities,
        row.echo_next,
        row.position_offset,
        min(params.top_k, _MAX_INTEGER),
        _NONE if params.max_new_tokens is None else min(params.max_new_tokens, _MAX_INTEGER),
        params.min_new_tokens,
        params.seed - _BITS_64 if params.seed >= _SIGN_64 else params.seed,
        params.top_p,
        params.min_p,
        params.temperature,
        params.frequency_penalty,
        params.presence_penalty,
        params.repetition_penalty,
    )


def _sets(numbers: tuple[int, ...], num_sets: int) -> list[frozenset[int]]:
    """Sets that each come as a length and so many numbers."""
    rest, sets = iter(numbers), []
    for _ in range(num_sets):
        length = next(rest, -1)
        if not 0 <= length <= len(numbers):
            raise TransportError("A run has sets of stop ids that do not fit.")
        sets.append(frozenset(islice(rest, length)))
    return sets


def _row(
    record: tuple[Any, ...],
    name: str,
    active: npt.NDArray[np.int64],
    table: npt.NDArray[np.int32],
    sets: Sequence[frozenset[int]],
) -> RunRow:
    num_active, _, stops, flags, processed, max_new, generated, prompt, log_probabilities, echo_next, offset = record[
        1:12
    ]
    lowest = stops | flags | processed | max_new | generated | prompt | (log_probabilities + 1) | (echo_next + 1)
    if lowest < 0 or num_active < 1 or stops >= len(sets):  # a bitwise or is negative when one of its numbers is
        raise TransportError("A run has a length, or a set of stop ids, that cannot be.")
    return RunRow(
        request_id=name,
        active_tokens=active,
        processed_length=processed,
        block_table=table,
        max_new_tokens=max_new,
        sampling_params=_sampling_params(flags & _OF_SAMPLING, *record[12:]),
        stop_ids=sets[stops],
        generated_length=generated,
        prompt_length=prompt,
        log_probabilities=None if log_probabilities == _NONE else log_probabilities,
        echo=bool(flags & _ECHO),
        echo_next=echo_next,
        position_offset=offset,
    )


@lru_cache(maxsize=4096)  # a request has the same ones in all its runs
def _sampling_params(
    flags: int,
    top_k: int,
    max_new_tokens: int,
    min_new_tokens: int,
    seed: int,
    top_p: float,
    min_p: float,
    temperature: float,
    frequency_penalty: float,
    presence_penalty: float,
    repetition_penalty: float,
) -> SamplingParams:
    return SamplingParams(
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        temperature=temperature,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        repetition_penalty=repetition_penalty,
        max_new_tokens=None if max_new_tokens == _NONE else max_new_tokens,
        min_new_tokens=min_new_tokens,
        ignore_eos=bool(flags & _IGNORE_EOS),
        seed=seed + _BITS_64 if flags & _UNSIGNED_SEED else seed,
    )


class _Rare(NamedTuple):
    """What most rows lack: how many histories, stop texts and images follow. Each begins with its row's number."""

    num_histories: int
    num_stops: int
    num_images: int
    num_grammars: int
    num_controls: int

    @classmethod
    def of(cls, rows: Sequence[RunRow]) -> _Rare:
        histories = stops = images = grammars = controls = 0
        for row in rows:
            histories += row.history is not None
            stops += _has_stops(row)
            images += len(row.images)
            grammars += row.sampling_params.structured_output is not None
            controls += row.sampling_params.logit_controls is not None
        return cls(histories, stops, images, grammars, controls)

    def write(self, writer: PayloadWriter, rows: Sequence[RunRow]) -> None:
        for i, row in enumerate(rows):
            if row.history is not None:
                writer.counts((i,))
                writer.array(row.history)
        for i, row in enumerate(rows):
            if _has_stops(row):
                writer.counts((i,))
                writer.texts(row.sampling_params.stop)
                writer.integers(row.sampling_params.stop_token_ids)
        for i, row in enumerate(rows):
            for image in row.images:
                writer.counts((i,))
                _write_image(writer, image)
        for i, row in enumerate(rows):
            grammar = row.sampling_params.structured_output
            if grammar is not None:
                writer.counts((i,))
                writer.texts((grammar.kind, grammar.text, grammar.whitespace))
        for i, row in enumerate(rows):
            controls = row.sampling_params.logit_controls
            if controls is not None:
                writer.counts((i,))
                write_logit_controls(writer, controls)

    def read(self, reader: PayloadReader, rows: list[RunRow]) -> None:
        for _ in range(self.num_histories):
            row = _next_row(reader, rows)
            row.history = reader.array(INT64)
        for _ in range(self.num_stops):
            row = _next_row(reader, rows)
            stop, stop_token_ids = tuple(reader.texts()), reader.integers()
            row.sampling_params = replace(row.sampling_params, stop=stop, stop_token_ids=stop_token_ids)
        for _ in range(self.num_images):
            row = _next_row(reader, rows)
            row.images += (_read_image(reader),)
        for _ in range(self.num_grammars):
            row = _next_row(reader, rows)
            row.sampling_params = replace(row.sampling_params, structured_output=_read_grammar(reader))
        for _ in range(self.num_controls):
            row = _next_row(reader, rows)
            row.sampling_params = replace(row.sampling_params, logit_controls=read_logit_controls(reader))


def _has_stops(row: RunRow) -> bool:
    return bool(row.sampling_params.stop or row.sampling_params.stop_token_ids)


def _next_row(reader: PayloadReader, rows: list[RunRow]) -> RunRow:
    (number,) = reader.counts(1)
    if number >= len(rows):
        raise TransportError("A run names a row that it has not.")
    return rows[number]


def _read_grammar(reader: PayloadReader) -> GrammarSpec:
    kind, text, whitespace = reader.texts(3)
    if kind not in _KINDS or whitespace not in _WHITESPACES:
        raise TransportError("A run has a grammar of an unknown kind.")
    return GrammarSpec(_KINDS[kind], text, _WHITESPACES[whitespace])


def _write_image(writer: PayloadWriter, image: PromptImage) -> None:
    writer.integers((image.start, image.rows, image.columns))
    writer.array(np.ascontiguousarray(image.pixels))
    writer.array(np.asarray(image.scale, dtype=FLOAT32))
    writer.array(np.asarray(image.shift, dtype=FLOAT32))
    writer.raw(image.digest)


def _read_image(reader: PayloadReader) -> PromptImage:
    start, num_rows, num_columns = reader.integers(3)
    pixels = reader.array(UINT8, 3)
    scale, shift = reader.column(FLOAT32, 3), reader.column(FLOAT32, 3)
    if pixels.shape[2] != 3 or start < 0 or num_rows < 1 or num_columns < 1:
        raise TransportError("A run has an image of a shape that cannot be.")
    return PromptImage(pixels, scale, shift, start, num_rows, num_columns, reader.raw())
