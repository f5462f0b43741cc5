"""Ids of events: how many events of each choice a client has.

A stream of one choice has the ids 1, 2, 3. With several choices an id has a number for each, `4-7`: in which order
the choices' events come depends on the replica, their order within a choice does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from max_ray.errors import InputError, quoted

_ID = re.compile(r"\d{1,9}(-\d{1,9}){0,127}", re.ASCII)


def event_id(counts: Sequence[int]) -> str:
    """The id of an event.

    Args:
        counts: Events of each choice up to it.
    """
    return "-".join(map(str, counts))


def parse_cursor(text: str | None, num_choices: int) -> list[int]:
    """Events of each choice that a client has.

    Args:
        text: The id of the last event; None or "0": it has none.
        num_choices: Of the stream.

    Raises:
        InputError: It is no id of an event of this stream.
    """
    if text is None or text in ("", "0"):
        return [0] * num_choices
    numbers = text.split("-")
    if not _ID.fullmatch(text) or len(numbers) != num_choices:
        example = event_id([12] * min(num_choices, 2))
        raise InputError(
            f"{quoted(text)} is not the id of an event of this stream of {num_choices} choices: ids are like "
            f"{example!r}, and 0 asks for all events.",
            param="from",
        )
    return [int(number) for number in numbers]
