"""Logit controls in the payload of a run.

numbers        typical_p, xtc_probability, xtc_threshold, dry_multiplier, dry_base (float64)
integers       repeat_last_n, dry_allowed_length, dry_penalty_last_n, 1 where there is a list of allowed tokens
bias           tokens (int64), values (float64)
allowed        tokens (int64)
ragged         bad words; breakers of DRY
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

from max_ray.errors import TransportError
from max_ray.interfaces import LogitControls
from max_ray.transport.arrays import PayloadReader, PayloadWriter


def write_logit_controls(writer: PayloadWriter, controls: LogitControls) -> None:
    """Appends the controls of one row."""
    writer.floats(
        (
            controls.typical_p,
            controls.xtc_probability,
            controls.xtc_threshold,
            controls.dry_multiplier,
            controls.dry_base,
        )
    )
    has_allowed = controls.allowed_token_ids is not None
    writer.integers(
        (controls.repeat_last_n, controls.dry_allowed_length, controls.dry_penalty_last_n, int(has_allowed))
    )
    writer.integers([token for token, _ in controls.logit_bias])
    writer.floats([value for _, value in controls.logit_bias])
    writer.integers(controls.allowed_token_ids or ())
    _write_ragged(writer, controls.bad_words)
    _write_ragged(writer, controls.dry_breakers)


def read_logit_controls(reader: PayloadReader) -> LogitControls:
    """See `write_logit_controls`. Raises TransportError for what does not fit, InputError for values out of range."""
    typical_p, xtc_probability, xtc_threshold, dry_multiplier, dry_base = reader.floats(5)
    repeat_last_n, dry_allowed_length, dry_penalty_last_n, has_allowed = reader.integers(4)
    biased = reader.integers()
    biases = reader.floats(len(biased))
    allowed = reader.integers()
    return LogitControls(
        logit_bias=tuple(zip(biased, biases, strict=True)),
        allowed_token_ids=allowed if has_allowed else None,
        bad_words=_read_ragged(reader),
        repeat_last_n=repeat_last_n,
        typical_p=typical_p,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        dry_multiplier=dry_multiplier,
        dry_base=dry_base,
        dry_allowed_length=dry_allowed_length,
        dry_penalty_last_n=dry_penalty_last_n,
        dry_breakers=_read_ragged(reader),
    )


def _write_ragged(writer: PayloadWriter, sequences: Sequence[Sequence[int]]) -> None:
    writer.counts([len(sequence) for sequence in sequences])
    writer.integers(list(chain.from_iterable(sequences)))


def _read_ragged(reader: PayloadReader) -> tuple[tuple[int, ...], ...]:
    lengths, numbers = reader.counts(), reader.integers()
    if sum(lengths) != len(numbers):
        raise TransportError("A run has token sequences whose lengths do not fit.")
    rest = iter(numbers)
    return tuple(tuple(islice(rest, length)) for length in lengths)
