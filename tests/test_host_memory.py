from __future__ import annotations

from pathlib import Path

import pytest
import torch

from max_ray import host_memory


@pytest.mark.parametrize("shape", [(3,), (5, 7), (1 << 20,), (1025, 1025), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [host_memory.zeros, host_memory.resident_zeros])
def test_zeros(shape: tuple[int, ...], dtype: torch.dtype, make: object) -> None:
    data = make(*shape, dtype=dtype)  # type: ignore[operator]
    assert (tuple(data.shape), data.dtype, int(data.count_nonzero())) == (shape, dtype, 0)
    data.fill_(1)
    assert int(data.count_nonzero()) == data.numel()


def resident(data: torch.Tensor) -> tuple[int, str]:
    """(bytes of the tensor's mapping that are there, its flags)."""
    size, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(n, 16) for n in first.split("-"))
            inside = begin <= data.data_ptr() < end
            assert not (inside and "zero" in line), "shared memory gets no large pages"
        elif inside and first == "Rss:":
            size = int(line.split()[1]) * 1024
        elif inside and first == "VmFlags:":
            return size, line
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux")
def test_pages_come_when_they_are_written_or_at_once() -> None:
    nbytes = 64 << 20
    lazy = host_memory.zeros(nbytes)
    size, flags = resident(lazy)
    assert size < nbytes // 4
    assert " hg" in flags
    at_once = host_memory.resident_zeros(nbytes, dtype=torch.uint8)
    assert resident(at_once)[0] >= nbytes
