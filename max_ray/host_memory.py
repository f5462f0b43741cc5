"""Large pieces of host memory, in pages of their own.

The C library keeps for later what is freed (under glibc, buffers of some MiB that come and go left half a checkpoint
behind in the heap) and hands out pages of 4 KiB. Pages of one's own go back to the system with the tensor, and come by
2 MiB where the system has such pages: fewer faults at the first writing, fewer page walks when gigabytes stream by.
"""

from __future__ import annotations

import ctypes
import math
import mmap

import torch

_OWN_PAGES_BYTES = 2**18  # tensors from here on get pages of their own
_HUGE_PAGE_BYTES = 2**21


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Zeros on the CPU. The pages of a large tensor are untouched: each comes when it is first written."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _OWN_PAGES_BYTES:
        data = torch.empty(nbytes, dtype=torch.uint8)
        data.numpy().fill(0)  # torch.zeros would start threads of its own for each thread that loads
        return data.view(dtype).view(shape)
    # Python's default is shared memory, which gets no large pages.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = torch.frombuffer(pages, dtype=dtype).view(shape)
    advise_huge_pages(data)
    return data


def resident_zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """`zeros` whose pages are all there: no later write waits for one, or finds that there is none."""
    data = zeros(*shape, dtype=dtype)
    data.view(-1).view(torch.uint8).numpy()[:: mmap.PAGESIZE] = 0
    return data


def advise_huge_pages(memory: torch.Tensor) -> None:
    """Asks for pages of 2 MiB behind a contiguous tensor that has not been written yet. A hint, no more."""
    nbytes = memory.numel() * memory.itemsize
    if nbytes < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    page = mmap.PAGESIZE
    first, last = -(-memory.data_ptr() // page) * page, (memory.data_ptr() + nbytes) // page * page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)
