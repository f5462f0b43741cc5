"""StringArray: an array of strings as it stands in a GGUF file, decoded item by item when it is read.

A tokenizer has hundreds of thousands of them, and most readers of a header want none.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

_LENGTH = struct.Struct("<Q")


class StringArray(Sequence[str]):
    """A sequence of strings. Reading an item raises UnicodeDecodeError where it is not UTF-8.

    Args:
        data: The array's bytes: of each string its length (u64) and its characters.
        starts: Where each string's length stands in `data`.
    """

    def __init__(self, data: bytes, starts: Sequence[int]) -> None:
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
        starts, end, length_of = array("Q"), position, _LENGTH.unpack_from
        try:
            for _ in range(count):
                starts.append(end - position)
                end += 8 + length_of(memory, end)[0]
        except (struct.error, OverflowError, ValueError):
            end = len(memory) + 1
        if end > len(memory):
            raise EOFError
        return cls(memory[position:end], starts), end

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._starts[index] + 8
        return self._data[start : start + _LENGTH.unpack_from(self._data, start - 8)[0]].decode()

    def __iter__(self) -> Iterator[str]:
        data = self._data
        ends = iter(self._starts)
        start = next(ends, 0) + 8
        for end in ends:
            yield data[start:end].decode()
            start = end + 8
        if self._starts:
            yield data[start:].decode()

    def __eq__(self, other: object) -> bool:
        """Like a list, an array equals one of the same strings."""
        if isinstance(other, StringArray):
            return self._data == other._data
        return isinstance(other, list) and list(self) == other

    __hash__ = None  # type: ignore[assignment]
