"""Writes `architectures/ADAPTER.md`: `python -m tests.architectures.adapter_table` makes a tiny random checkpoint of
every causal language model of the installed `transformers`, runs it through the adapter, and says of each whether it
passes the parity test, or why not. Takes some minutes. Names as arguments: only prints those."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import torch
import transformers

from architectures.transformers_adapter import adapter_arch
from max_ray.conformance.command import is_routed
from max_ray.conformance.reference import huggingface_reference
from max_ray.conformance.suite import CASES, KL_LIMIT, LOGIT_LIMIT, NUM_GREEDY, PAGE, ROUTED_LOGIT_LIMIT, Suite
from max_ray.errors import ConfigError, ParallelismError
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import SupportedEncoding
from max_ray.registry import PIPELINE_REGISTRY
from tests.architectures.adapter_models import (
    OF_SEVERAL_NETWORKS,
    causal_classes,
    is_composite,
    make_adapter_checkpoint,
)

FILE = Path(__file__).parents[2] / "architectures" / "ADAPTER.md"
SECONDS_A_CLASS = 90
HEAD = """# Decoders of transformers through the adapter

Written by `python -m tests.architectures.adapter_table`; do not edit by hand. Every class that `transformers` {version}
lists for causal language models, as a tiny random checkpoint (`tests/architectures/adapter_models.py`) run by its own
modelling code with our paged attention in it (`transformers_adapter/`), beside the same code with plain attention, each
sequence alone, in float32 on a CPU. **{passed} of {total} pass.**

- float32: the largest difference of any logit over whole prompts side by side, prompts in pieces beside rows that
  decode, and a prompt whose first pages (of {page} tokens) another computed. Limit {limit:g}, for mixtures of experts
  {routed:g}; and {greedy} greedy tokens are those that `transformers` picks.
- 2 ranks: the same, on two tensor-parallel ranks, by the network's own plan in `transformers`.
- bfloat16: KL divergence in nats from the float32 reference (for mixtures of experts the median over tokens). Where it
  is over {kl:g}, that of `transformers` itself in bfloat16 is in brackets; ours is bold where it is over twice that.

A class that a family of ours covers (marked *) runs through the adapter only with `override_architecture`.
"""


@dataclass(frozen=True)
class Line:
    """A class, whether it passes in float32 on one rank, and the cells of its line."""

    name: str
    passed: bool
    cells: tuple[str, ...]


class _TooLong(BaseException):
    """Foreign code that does not come to an end."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises _TooLong in the body after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def line_of(class_name: str) -> Line:
    """Runs a class. Nothing that its code does ends the sweep."""
    if "ConditionalGeneration" in class_name or is_composite(class_name):
        return Line(class_name, False, (OF_SEVERAL_NETWORKS,))
    try:
        with at_most(SECONDS_A_CLASS), TemporaryDirectory() as folder:
            return _run(class_name, Path(folder))
    except ConfigError as error:
        return Line(class_name, False, (_reason(class_name, error),))
    except Exception as error:  # noqa: BLE001 - whatever a class of transformers raises is its line in the table
        return Line(class_name, False, (f"**not expected**: {type(error).__name__}: {_short(str(error))}",))
    except _TooLong:
        return Line(class_name, False, (f"not finished after {SECONDS_A_CLASS} s",))


def _run(class_name: str, folder: Path) -> Line:
    try:
        path = make_adapter_checkpoint(class_name, folder)
        reference = huggingface_reference(path)
        reference([[1, 2, 3]])
    except Exception as error:  # noqa: BLE001 - as above
        if getattr(getattr(transformers, class_name), "_is_stateful", False):
            return Line(class_name, False, ("it keeps a state of its own (recurrent or compressed)",))
        return Line(class_name, False, (f"no tiny checkpoint: {type(error).__name__}: {_short(str(error))}",))
    config = load_huggingface_config(path)
    suite = Suite(adapter_arch, path, reference, is_routed(config))
    one = suite.run(1, SupportedEncoding.float32)
    passed = all(verdict.passed for verdict in one)
    worst = f"{max(verdict.error for verdict in one):.0e}"
    cells = (worst if passed else f"**{worst}**", _two_ranks(suite), _bfloat16(suite))
    return Line(class_name, passed, cells)


def _two_ranks(suite: Suite) -> str:
    try:
        verdicts = suite.run(2, SupportedEncoding.float32)
    except ParallelismError as error:
        return "no plan" if "no tensor-parallel plan" in str(error) else _short(str(error))
    except Exception as error:  # noqa: BLE001 - as above
        return f"**{type(error).__name__}: {_short(str(error))}**"
    worst = f"{max(verdict.error for verdict in verdicts):.0e}"
    return worst if all(verdict.passed for verdict in verdicts) else f"**{worst}**"


def _bfloat16(suite: Suite) -> str:
    verdicts = suite.run(1, SupportedEncoding.bfloat16)
    worst = f"{max(verdict.error for verdict in verdicts):.0e}"
    if all(verdict.passed for verdict in verdicts):
        return worst
    reference = huggingface_reference(suite.path, torch.bfloat16)
    theirs = max(
        suite.divergence(reference(sequences), suite.reference(sequences)) for sequences in map(suite.sequences, CASES)
    )
    ours = worst if max(verdict.error for verdict in verdicts) <= 2 * theirs else f"**{worst}**"
    return f"{ours} ({theirs:.0e})"


def _reason(class_name: str, error: ConfigError) -> str:
    text = str(error).removeprefix(f"{class_name} cannot run on a paged cache: ")
    return _short(text.rstrip("."))


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= 160 else f"{text[:160]}.."


def _row(line: Line, own: set[str]) -> str:
    name = f"`{line.name}`{'*' if line.name in own else ''}"
    return f"| {name} | {' | '.join(line.cells)} |"


def table(lines: list[Line]) -> str:
    """The whole file."""
    own = set(PIPELINE_REGISTRY.architecture_names())
    passed = [line for line in lines if line.passed]
    ran = [line for line in lines if not line.passed and len(line.cells) > 1]
    head = HEAD.format(
        version=transformers.__version__,
        passed=len(passed),
        total=len(lines),
        page=PAGE,
        limit=LOGIT_LIMIT,
        routed=ROUTED_LOGIT_LIMIT,
        greedy=NUM_GREEDY,
        kl=KL_LIMIT,
    )
    parts = [head, "| class | float32 | 2 ranks | bfloat16 |", "|---|---|---|---|"]
    parts += [_row(line, own) for line in [*passed, *ran]]
    parts += ["", "## Refused, or not tried", "", "| class | why |", "|---|---|"]
    parts += [_row(line, own) for line in lines if not line.passed and len(line.cells) == 1]
    return "\n".join(parts) + "\n"


def main(names: list[str]) -> int:
    """Exit status 1 where a class runs and is wrong."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    lines = []
    for name in names or causal_classes():
        lines.append(line_of(name))
        print("ok  " if lines[-1].passed else "    ", name, " | ".join(lines[-1].cells), flush=True)
    if not names:
        FILE.write_text(table(lines), encoding="utf-8")
    return int(any(not line.passed and len(line.cells) > 1 for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
