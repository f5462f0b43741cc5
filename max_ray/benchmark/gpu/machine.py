"""Step `machine`: versions, the device, its memory, and whether one kernel runs at all."""

from __future__ import annotations

import argparse
import platform
import sys
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from max_ray.benchmark.case_log import CaseLog
from max_ray.benchmark.gpu.flags import device_and_dtype, parse
from max_ray.benchmark.timing import Machine, synchronize
from max_ray.kernels.gpu.empty import add_one


def versions() -> dict[str, Any]:
    """Of Python and of what the steps need."""
    names = ("torch", "triton", "transformers", "numpy", "pytest")
    return {"python": platform.python_version(), "cuda": torch.version.cuda, **{name: version(name) for name in names}}


def describe(device: torch.device) -> dict[str, Any]:
    """Of a GPU: name, compute capability, processors, memory."""
    if device.type != "cuda":
        return {"device": "CPU", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "shared_memory_a_processor": properties.shared_memory_per_multiprocessor,
        "memory_bytes": total,
        "free_bytes": free,
    }


def launch(device: torch.device) -> dict[str, Any]:
    """One Triton kernel, read back."""
    x = add_one(torch.zeros(1, dtype=torch.int32, device=device))
    return {"agrees": x.item() == 1}


def main(arguments: list[str] | None = None) -> int:
    options: argparse.Namespace = parse("machine", arguments)
    device, dtype = device_and_dtype(options)
    log = CaseLog.from_environment("machine", partial(synchronize, device))
    for name, case in (
        ("versions", versions),
        ("device", partial(describe, device)),
        ("launch", partial(launch, device)),
        ("ceilings", lambda: Machine.measure(device, dtype).as_json()),
    ):
        print(name, log.run(name, case), flush=True)
    log.finish()
    return 1 if log.failed else 0


if __name__ == "__main__":
    sys.exit(main())
