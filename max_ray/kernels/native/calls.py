"""Kernel: an exported C++ function that can be called, and whose calls can be noted and replayed (see tape.py)."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch

from max_ray.kernels.native.build import library


class RopeShape(ctypes.Structure):
    """As in csrc/kernels.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("T", "H", "KVH", "D", "R", "q_stride", "k_stride", "v_stride")] + [
        ("interleaved", ctypes.c_int)
    ]


class QuantizedMatrix(ctypes.Structure):
    """As in csrc/kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "high_codes", "scales", "mins", "super_scales", "super_mins")),
        *((name, ctypes.c_int64) for name in ("group_size", "single_zero")),
    ]


class AttentionShape(ctypes.Structure):
    """As in csrc/kernels.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("B", "H", "KVH", "D", "page_size", "table_width", "window")] + [
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class LatentShape(ctypes.Structure):
    """As in csrc/kernels.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("B", "H", "P", "R", "L", "V", "page_size", "table_width")] + [
        ("scale", ctypes.c_float)
    ]


_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, list[type]] = {
    "linear": [_P, _L, _L, _L, _P, _L, _P, _P, _I],
    "linear_dot": [_P, _L, _L, _L, _P, _L, _P, _P, _I],
    "linear_tiles": [_P, _L, _L, _L, _P, _L, _P, _P, _I],
    "pack": [_P, _L, _L, _P, _I],
    "rows": [_P, _L, _P, _L, _P, _I],
    "rmsnorm": [_P, _P, _P, _L, _L, _F, _I],
    "add_rmsnorm": [_P, _P, _P, _P, _P, _L, _L, _F, _I],
    "silu_and_mul": [_P, _P, _L, _L, _I],
    "gather_rows": [_P, _L, _P, _L, _L, _P],
    "sum_rows": [_P, _L, _L, _P],
    "argmax": [_P, _L, _L, _L, _P, _I],
    "decode_slots": [_P, _L, _P, _L, _L, _P],
    "positions": [_P, _L, _P],
    "rope_and_append": [_P, _P, _P, _P, _P, _P, _P, _P, _P, ctypes.POINTER(RopeShape), _I],
    "paged_attention": [_P, _P, _P, _P, _P, _P, _P, _P, ctypes.POINTER(AttentionShape), _I],
    "latent_attention": [_P, _P, _P, _P, _P, _P, _P, ctypes.POINTER(LatentShape), _I],
}
for _kind in ("q4k", "q5k", "q6k", "q8", "q4", "q41"):
    for _way in ("linear", "int8"):
        _SIGNATURES[f"{_kind}_{_way}"] = [ctypes.POINTER(QuantizedMatrix), _P, _L, _L, _L, _P, _L, _I]
_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64"}
_MAX_ARGUMENTS = 12  # as in csrc/replay.cpp


class RecordedCall(ctypes.Structure):
    """As `Call` in csrc/replay.cpp."""

    _fields_ = [("again", ctypes.c_void_p), ("arguments", ctypes.c_int64 * _MAX_ARGUMENTS)]


class Recorder(Protocol):
    """Who notes the kernel calls of a thread. memory: keeps what the calls point to."""

    memory: list[Any]

    def native(self, call: RecordedCall) -> None: ...


class _Thread(threading.local):
    recorder: Recorder | None = None


_thread = _Thread()


class Kernel:
    """Runs the C++ function; without the interpreter lock, so that control calls are answered meanwhile."""

    def __init__(self, loaded: ctypes.CDLL, name: str, kind: str) -> None:
        self._function = getattr(loaded, f"{name}_{kind}")
        self._function.argtypes, self._function.restype = _SIGNATURES[name], None
        self._is_float = [argument is _F for argument in _SIGNATURES[name]]
        self._again = ctypes.cast(getattr(loaded, f"{name}_{kind}_again"), ctypes.c_void_p).value

    def __call__(self, *arguments: Any) -> None:
        """arguments: addresses (None: a null pointer), integers, and floats where the signature has them; a ctypes
        structure stands for its address."""
        recorder = _thread.recorder
        if recorder is not None:
            recorder.native(self._recorded(arguments))
            recorder.memory.append(arguments)
        self._function(*arguments)

    def _recorded(self, arguments: Sequence[Any]) -> RecordedCall:
        words = [_word(value, is_float) for value, is_float in zip(arguments, self._is_float, strict=True)]
        return RecordedCall(self._again, (ctypes.c_int64 * _MAX_ARGUMENTS)(*words))


def _word(value: Any, is_float: bool) -> int:
    if is_float:
        return int.from_bytes(struct.pack("<f", value), "little")
    if isinstance(value, ctypes.Structure):
        return ctypes.addressof(value)
    return 0 if value is None else int(value)


@cache
def kernel(name: str, dtype: torch.dtype) -> Kernel | None:
    """The kernel for a dtype; None for a dtype without one."""
    loaded, kind = library(), _KINDS.get(dtype)
    assert loaded is not None, "the C++ kernels are used only where they are loaded"
    return None if kind is None else Kernel(loaded, name, kind)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """This thread's kernel calls are noted, too."""
    assert _thread.recorder is None, "recordings do not nest"
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None


def replay_calls(calls: Sequence[RecordedCall]) -> Callable[[], object]:
    """A function that makes these calls again, in one call into C++."""
    loaded = library()
    assert loaded is not None, "calls were recorded"
    replay = loaded.replay
    replay.argtypes, replay.restype = [_P, _L], None
    array = (RecordedCall * len(calls))(*calls)
    return lambda: replay(array, len(array))
