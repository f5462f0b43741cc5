"""Flags of `max-ray benchmark kernels` and `offline`. No torch here: the command line reads this at every start."""

from __future__ import annotations

import argparse

from max_ray.errors import ConfigError


def add_kernel_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_common(parser)
    add("--tokens", type=int, metavar="N", help="Tokens of a prefill step. Default: 8192 on a GPU, 64 on a CPU.")
    add("--context", type=int, metavar="N", help="Longest sequence. Default: 8192 on a GPU, 128 on a CPU.")
    add("--rows", metavar="N,N", help="Rows of decode batches. Default: 1,64,256 on a GPU, 1,4 on a CPU.")


def add_offline_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_common(parser)
    add("--family", default="architectures.llama3", metavar="MODULE", help="Module with ARCHITECTURES that runs the "
        "shape. Default: architectures.llama3.")  # fmt: skip
    add("--batches", default="1,8,64,256", metavar="N,N", help="Rows of decode batches. Default: 1,8,64,256.")
    add("--context", type=int, default=512, metavar="N", help="Tokens of a row before decoding. Default: 512.")
    add("--steps", type=int, default=64, metavar="N", help="Decode steps that are timed. Default: 64.")
    add("--prompt", type=int, default=2048, metavar="N", help="Tokens of the prompt that is timed. Default: 2048.")
    add("--peer", default="transformers", metavar="NAME", help="transformers (static cache, torch.compile), or none.")
    add("--peer-budget", type=float, default=240.0, metavar="SECONDS", help="No further measurement of the peer is "
        "begun after this. Default: 240.")  # fmt: skip


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", metavar="NAME", help="llama-8b, llama-1b, tiny, or a config.json. Default: llama-8b on a GPU, tiny "
        "on a CPU.")  # fmt: skip
    add("--device", metavar="NAME", help="cuda or cpu. Default: a GPU where there is one.")
    add("--dtype", default="bfloat16", metavar="NAME", help="bfloat16, float16 or float32. Default: bfloat16.")
    add("--json", metavar="FILE", help="Write the results.")


def numbers(text: str) -> list[int]:
    """The positive numbers of "1,8,64". Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{text!r} should be positive numbers with commas between, as in 1,8,64.")
    return [int(part) for part in parts]


def check_positive(**values: float) -> None:
    """Raises ConfigError for the first value that is not positive."""
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} should be positive, not {value}.")
