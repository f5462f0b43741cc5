"""Arrays and texts in a payload. A reader checks every number against what is there before it allocates anything.

array    dtype code (1 byte), number of dimensions (1 byte), each dimension (4 bytes), the values; little-endian
ragged   int32 array of counts, then an array of all values
texts    int32 array of byte counts, then the UTF-8 bytes
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from max_ray.errors import TransportError

AnyArray = npt.NDArray[Any]
MAX_DIMENSIONS = 4
_MAX_EMPTY = 2**20  # dimensions of an array without values: numpy multiplies the others

_DTYPES = tuple(np.dtype(name) for name in ("u1", "<i4", "<i8", "<u8", "<f4", "<f8"))
_UINT8, _INT32, _INT64, _FLOAT64 = 0, 1, 2, 5
INT32, INT64, FLOAT32, FLOAT64, UINT8 = (np.dtype(name) for name in ("<i4", "<i8", "<f4", "<f8", "u1"))
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_HEADERS = tuple(struct.Struct(f"<BB{num_dims}I") for num_dims in range(MAX_DIMENSIONS + 1))
_TEXT_ERRORS = "surrogatepass"  # a client's text may hold lone surrogates


class PayloadWriter:
    """Collects the parts of a payload; `bytes` joins them."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def pack(self, layout: struct.Struct, *values: int) -> None:
        """Appends fixed fields."""
        self._parts.append(layout.pack(*values))

    def array(self, values: AnyArray) -> None:
        """Appends an array of one of the known dtypes and at most four dimensions."""
        self._parts.append(_HEADERS[values.ndim].pack(_CODES[values.dtype], values.ndim, *values.shape))
        self._parts.append(values.tobytes())

    def integers(self, values: Sequence[int]) -> None:
        """Appends an int64 array [n]. `struct` is faster than numpy for lists of Python numbers."""
        self._parts.append(struct.pack(f"<BBI{len(values)}q", _INT64, 1, len(values), *values))

    def counts(self, values: Sequence[int]) -> None:
        """Appends an int32 array [n]."""
        self._parts.append(struct.pack(f"<BBI{len(values)}i", _INT32, 1, len(values), *values))

    def floats(self, values: Sequence[float]) -> None:
        """Appends a float64 array [n]."""
        self._parts.append(struct.pack(f"<BBI{len(values)}d", _FLOAT64, 1, len(values), *values))

    def joined(self, rows: Sequence[AnyArray], dtype: np.dtype[Any]) -> None:
        """Appends an array with all values of `rows`; their lengths go elsewhere (see `split`)."""
        data = b"".join([row.tobytes() if row.dtype == dtype else row.astype(dtype).tobytes() for row in rows])
        self._parts.append(_HEADERS[1].pack(_CODES[dtype], 1, len(data) // dtype.itemsize))
        self._parts.append(data)

    def ragged(self, rows: Sequence[AnyArray], dtype: np.dtype[Any]) -> None:
        """Appends rows of different lengths."""
        self.counts([len(row) for row in rows])
        self.joined(rows, dtype)

    def texts(self, texts: Sequence[str]) -> None:
        """Appends a list of texts."""
        encoded = list(map(text_bytes, texts))
        self.counts([len(text) for text in encoded])
        self.raw(b"".join(encoded))

    def raw(self, data: bytes) -> None:
        """Appends bytes as a uint8 array."""
        self._parts.append(_HEADERS[1].pack(0, 1, len(data)))
        self._parts.append(data)

    def bytes(self) -> bytes:
        """The payload."""
        return b"".join(self._parts)


class PayloadReader:
    """Reads a payload from its beginning. Every method raises TransportError for bytes that do not fit."""

    __slots__ = ("_data", "_end", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._end = len(data)
        self._position = 0

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """Fixed fields."""
        start = self._advance(layout.size)
        return layout.unpack_from(self._data, start)

    def array(self, dtype: np.dtype[Any], num_dims: int = 1) -> AnyArray:
        """A writable array with a copy of the values."""
        return self.view(dtype, num_dims).copy()

    def view(self, dtype: np.dtype[Any], num_dims: int = 1) -> AnyArray:
        """An array over the payload's own bytes: read-only, and not always aligned."""
        header = _HEADERS[num_dims]
        start = self._advance(header.size)
        code, found_dims, *shape = header.unpack_from(self._data, start)
        if found_dims != num_dims or code != _CODES[dtype]:
            raise TransportError(f"A message has another array than one of {dtype} with {num_dims} dimension(s).")
        count = math.prod(shape)
        start = self._advance(count * dtype.itemsize)
        if not count:
            return _empty(shape, dtype)
        values = np.frombuffer(self._data, dtype, count, start)
        return values if num_dims == 1 else values.reshape(shape)

    def column(self, dtype: np.dtype[Any], length: int) -> AnyArray:
        """A writable array [length]."""
        values = self.array(dtype)
        if len(values) != length:
            raise TransportError(f"A message has a column of {len(values)} values for {length} rows.")
        return values

    def integers(self, length: int | None = None) -> tuple[int, ...]:
        """The numbers of an int64 array; any number of them by default."""
        return self._numbers(_INT64, 8, "q", length)

    def counts(self, length: int | None = None) -> tuple[int, ...]:
        """The numbers of an int32 array, none of them negative; any number of them by default."""
        values = self._numbers(_INT32, 4, "i", length)
        if min(values, default=0) < 0:
            raise TransportError("A message has a negative length.")
        return values

    def floats(self, length: int | None = None) -> tuple[float, ...]:
        """The numbers of a float64 array; any number of them by default."""
        return self._numbers(_FLOAT64, 8, "d", length)

    def split(self, dtype: np.dtype[Any], lengths: Sequence[int]) -> list[AnyArray]:
        """Rows of these lengths: views of one writable copy."""
        values = self.array(dtype)
        if len(lengths) == 1 and lengths[0] == len(values):
            return [values]
        return [values[start:end] for start, end in _pieces(lengths, len(values))]

    def ragged(self, dtype: np.dtype[Any], num_rows: int | None = None) -> list[AnyArray]:
        """Rows of different lengths, any number of them by default."""
        return self.split(dtype, self.counts(num_rows))

    def texts(self, num_texts: int | None = None) -> list[str]:
        """A list of texts; any number of them by default."""
        return self.split_texts(self.counts(num_texts))

    def split_texts(self, lengths: Sequence[int]) -> list[str]:
        """Texts of these lengths in bytes."""
        data = self.raw()
        try:
            return [data[start:end].decode("utf-8", _TEXT_ERRORS) for start, end in _pieces(lengths, len(data))]
        except UnicodeDecodeError:
            raise TransportError("A message has a text that is not UTF-8.") from None

    def raw(self) -> bytes:
        """The bytes of a uint8 array [n]."""
        length = self._length(_UINT8, None)
        start = self._advance(length)
        return self._data[start : start + length]

    def finish(self) -> None:
        """Raises TransportError when bytes are left."""
        if self._position != self._end:
            raise TransportError(f"A message has {self._end - self._position} bytes too many.")

    def _numbers(self, code: int, size: int, letter: str, length: int | None) -> tuple[Any, ...]:
        count = self._length(code, length)
        return struct.unpack_from(f"<{count}{letter}", self._data, self._advance(count * size))

    def _length(self, code: int, length: int | None) -> int:
        found, num_dims, count = _HEADERS[1].unpack_from(self._data, self._advance(_HEADERS[1].size))
        if found != code or num_dims != 1:
            raise TransportError(f"A message has another array than a list of {_DTYPES[code]}.")
        if length is not None and count != length:
            raise TransportError(f"A message has a column of {count} values for {length} rows.")
        return int(count)

    def _advance(self, num_bytes: int) -> int:
        start = self._position
        if num_bytes > self._end - start:
            raise TransportError(f"A message ends {num_bytes - (self._end - start)} bytes too early.")
        self._position = start + num_bytes
        return start


def _empty(shape: list[int], dtype: np.dtype[Any]) -> AnyArray:
    if max(shape) >= _MAX_EMPTY:
        raise TransportError(f"A message has an array without values of the shape {tuple(shape)}.")
    return np.empty(shape, dtype)


def text_bytes(text: str) -> bytes:
    """As texts travel."""
    return text.encode("utf-8", _TEXT_ERRORS)


def _pieces(lengths: Sequence[int], total: int) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces that lie one after another. Raises TransportError when they do not add up to `total`."""
    ends = list(accumulate(lengths))
    if (ends[-1] if ends else 0) != total or min(lengths, default=0) < 0:
        raise TransportError("A message has pieces whose lengths do not add up.")
    return zip([0, *ends], ends, strict=False)
