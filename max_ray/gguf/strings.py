"""StringArray: an array of strings as it stands in a GGUF file, decoded item by item when it is read.

A tokenizer has hundreds of thousands of them, and most readers of a header want none.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import overload

import numpy as np
import numpy.typing as npt

_LENGTH = struct.Struct("<Q")
_LENGTH_BYTES = 8
_COMMON_BYTES = 64
"""More than a string of a tokenizer and its length take on average."""


class StringArray(Sequence[str]):
    """A sequence of strings. Reading an item raises UnicodeDecodeError where it is not UTF-8.

    Args:
        data: The array's bytes: of each string its length (u64) and its characters.
        starts: Where each string's length stands in `data`, int64 [count].
    """

    def __init__(self, data: bytes, starts: npt.NDArray[np.int64]) -> None:
        self._data = data
        self._starts = starts

    @classmethod
    def read(cls, memory: mmap.mmap, position: int, count: int) -> tuple[StringArray, int]:
        """Reads lengths only.

        Args:
            memory: The whole file.
            position: Where the first string's length stands.
            count: How many strings there are.

        Returns:
            The array, and the position behind it.

        Raises:
            EOFError: The array reaches beyond the file.
        """
        places = _places_of_short(memory[position : position + (count + 4) * _COMMON_BYTES], count)
        if places is None:
            places = _places(memory, position, count)
        end = position + int(places[-1])
        if end > len(memory):
            raise EOFError
        return cls(memory[position:end], places[:-1]), end

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = int(self._starts[index]) + _LENGTH_BYTES
        return self._data[start : start + _LENGTH.unpack_from(self._data, start - 8)[0]].decode()

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts())

    def texts(self) -> list[str]:
        """All strings."""
        joined = self._joined("\0")
        return self[:] if joined is None else joined.decode().split("\0")[1:]

    def pairs(self) -> list[tuple[str, str]] | None:
        """Each string cut at its only space; None where a string has no space, or more than one."""
        joined = self._joined(" ")
        if joined is None:
            return None
        spaces = np.flatnonzero(np.frombuffer(joined, dtype=np.uint8) == ord(" "))
        befores = self._starts - (_LENGTH_BYTES - 1) * np.arange(len(self))
        if len(spaces) != 2 * len(self) or (spaces[::2] != befores).any():
            return None
        halves = joined.decode().split(" ")
        return list(zip(halves[1::2], halves[2::2], strict=True))

    def _joined(self, separator: str) -> bytes | None:
        """The strings with `separator`, an ASCII character, before each; None where a string holds a zero byte."""
        data = np.frombuffer(self._data, dtype=np.uint8).copy()
        is_text = np.ones(len(data), dtype=np.bool_)
        for i in range(_LENGTH_BYTES):
            is_text[self._starts + i] = False
        if not data[is_text].all():
            return None
        data[self._starts] = ord(separator)
        is_text[self._starts] = True
        return data[is_text].tobytes()

    def __eq__(self, other: object) -> bool:
        """Like a list, an array equals one of the same strings."""
        if isinstance(other, StringArray):
            return self._data == other._data
        return isinstance(other, list) and list(self) == other

    __hash__ = None  # type: ignore[assignment]


def _places(memory: mmap.mmap, position: int, count: int) -> npt.NDArray[np.int64]:
    """Where each length stands after `position`, and where the last string ends: int64 [count + 1]. Raises EOFError."""
    places, at, length_of = [0], position, _LENGTH.unpack_from
    try:
        for _ in range(count):
            at += _LENGTH_BYTES + length_of(memory, at)[0]
            places.append(at - position)
        return np.array(places, dtype=np.int64)
    except (struct.error, OverflowError, ValueError):
        raise EOFError from None


def _places_of_short(data: bytes, count: int) -> npt.NDArray[np.int64] | None:
    """`_places` by the first byte of each length alone; None where a length has more, or `data` is too short."""
    places, at = [0], 0
    try:
        for _ in repeat(None, count):
            at += data[at] + _LENGTH_BYTES
            places.append(at)
    except IndexError:
        return None
    found = np.array(places, dtype=np.int64)
    if at > len(data):
        return None
    bytes_ = np.frombuffer(data, dtype=np.uint8)
    more = any(bytes_[found[:-1] + i].any() for i in range(1, _LENGTH_BYTES))
    return None if more else found
