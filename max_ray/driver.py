"""Devices by name: `CPU()` and `Accelerator(id)`, for users of the library and for `Module.to`; and the path of small
arrays between host and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from max_ray.errors import DeviceError


@dataclass(frozen=True)
class Device:
    """One device of this machine: `torch_device` is what PyTorch calls it."""

    torch_device: torch.device

    @property
    def id(self) -> int:
        return self.torch_device.index or 0

    @property
    def label(self) -> str:
        """ "cpu" or "gpu"."""
        return "cpu" if self.torch_device.type == "cpu" else "gpu"

    def __str__(self) -> str:
        return f"{self.label}:{self.id}"


class CPU(Device):
    """The host. There is one, whatever its number of sockets."""

    def __init__(self, id: int = 0) -> None:
        if id != 0:
            raise DeviceError(f"There is no CPU device {id}: the host is CPU(0).")
        super().__init__(torch.device("cpu"))


class Accelerator(Device):
    """GPU number `id` of this machine. Raises DeviceError when there is no such GPU."""

    def __init__(self, id: int = 0) -> None:
        count = accelerator_count()
        if not 0 <= id < count:
            has = "no GPU that PyTorch can use" if count == 0 else f"{count} GPU{'s' if count > 1 else ''}"
            remedy = "Use CPU()" if count == 0 else f"Use an id from 0 to {count - 1}"
            raise DeviceError(f"Accelerator({id}) does not exist: this machine has {has}. {remedy}.")
        super().__init__(torch.device("cuda", id))


def accelerator_count() -> int:
    """Number of GPUs that PyTorch can use here; 0 for a CPU build of it."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


DeviceLike = Device | torch.device | str


def as_torch_device(device: DeviceLike) -> torch.device:
    """The torch device that any way of writing a device means."""
    return device.torch_device if isinstance(device, Device) else torch.device(device)


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """`array` on the device. The host does not wait for a GPU, and may write to `array` again at once; on the CPU the
    tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda" or tensor.numel() == 0:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # the allocator keeps the pinned copy until it was read


class Download:
    """A tensor on its way to the host. `wait` gives it there; until then the host is free, and so is the device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> torch.Tensor:
        """The tensor on the host (the very tensor, where it was there from the beginning)."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
