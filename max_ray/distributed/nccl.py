"""Which NCCL this process has loaded, and whether torch was built for it.

`nvidia-nccl-cu12` and `nvidia-nccl-cu13` install the same file, nvidia/nccl/lib/libnccl.so.2: the one installed last is
loaded, whatever torch asks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from max_ray.errors import ConfigError
from max_ray.log import get_logger

_PACKAGES = ("nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
_REQUIREMENT = re.compile(r"(nvidia-nccl-cu\d+)\s*==\s*([\d.]+)")
_LOG = get_logger(__name__)


def check_nccl() -> None:
    """Logs the NCCL that torch has loaded. Raises ConfigError where torch was built for another one."""
    loaded = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    problem = nccl_problem(torch.version.cuda, required_nccl(requires("torch") or []), _installed(), loaded)
    if problem is not None:
        raise ConfigError(problem)
    _LOG.info("NCCL %s, from %s", loaded, _loaded_file(Path("/proc/self/maps")) or "torch itself")


def required_nccl(requirements: list[str]) -> tuple[str, str] | None:
    """(package, version) of NCCL that a distribution's requirements pin; None where they name none."""
    found = (_REQUIREMENT.match(requirement) for requirement in requirements)
    return next(((match[1], match[2]) for match in found if match), None)


def nccl_problem(
    cuda: str | None, required: tuple[str, str] | None, installed: Mapping[str, str], loaded: str
) -> str | None:
    """What is wrong with the installed NCCL, with the remedy; None: nothing.

    Args:
        cuda: CUDA version that torch was built for, such as "13.0".
        required: Package and version of NCCL that torch requires.
        installed: Version by package of NCCL.
        loaded: Version that the loaded library gives.
    """
    wanted = required[0] if required else f"nvidia-nccl-cu{(cuda or '').split('.')[0]}"
    others = sorted(set(installed) - {wanted})
    if others:
        pin = "==".join(required) if required else wanted
        return (
            f"{', '.join(others)} is installed beside a torch for CUDA {cuda}, and overwrites its NCCL library. "
            f"Run: pip uninstall {' '.join(others)}; pip install --force-reinstall --no-deps {pin}"
        )
    if required is not None and loaded != required[1]:
        return (
            f"NCCL {loaded} is loaded, and this torch was built for {required[1]}. Remove other copies from "
            f"LD_LIBRARY_PATH and run: pip install --force-reinstall --no-deps {'=='.join(required)}"
        )
    return None


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _loaded_file(maps: Path) -> str | None:
    """Path of the process's libnccl."""
    files = (line.split()[-1] for line in maps.read_text(encoding="utf-8").splitlines() if "libnccl" in line)
    return next(files, None)
