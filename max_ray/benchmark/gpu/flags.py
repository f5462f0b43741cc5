"""Flags that the modules of a visit share."""

from __future__ import annotations

import argparse

import torch

from max_ray.benchmark.timing import choose_device, choose_dtype


def parse(name: str, arguments: list[str] | None) -> argparse.Namespace:
    """`--device`, `--dtype` and `--shape` of a module."""
    parser = argparse.ArgumentParser(prog=f"python -m max_ray.benchmark.gpu.{name}", allow_abbrev=False)
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda or cpu. Default: cuda.")
    parser.add_argument("--dtype", default="bfloat16", metavar="NAME", help="Default: bfloat16.")
    parser.add_argument("--shape", default="llama-8b", metavar="NAME", help="Default: llama-8b.")
    return parser.parse_args(arguments)


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Raises ConfigError where the device is not there."""
    return choose_device(options.device), choose_dtype(options.dtype)
