"""Writes the parity table: `python -m tests.architectures.parity` runs every tiny model of `families.py` on 1 and 2
ranks in float32 and bfloat16, and puts the results into `architectures/PARITY.md`. Takes about a minute."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from max_ray.conformance.reference import huggingface_reference
from max_ray.conformance.suite import CASES, KL_LIMIT, LOGIT_LIMIT, NUM_GREEDY, PAGE, ROUTED_LOGIT_LIMIT, Suite, Verdict
from max_ray.interfaces import SupportedEncoding
from max_ray.registry import PIPELINE_REGISTRY
from tests.architectures.families import TINY_MODELS, TinyModel, make_tiny
from tests.architectures.vision import VISION_FAMILIES, VisionFamily, VisionLab

FILE = Path(__file__).parents[2] / "architectures" / "PARITY.md"
COLUMNS = [f"{case.name} {kind}" for kind in ("float32", "bfloat16") for case in CASES]
HEAD = f"""# Parity with Hugging Face

Written by `python -m tests.architectures.parity`; do not edit by hand. Each row is one tiny random checkpoint
(`tests/architectures/families.py`), run by the family's own code on 1 or 2 tensor-parallel ranks over a paged cache
with pages of {PAGE} tokens, beside `transformers` {{version}} in float32 with plain attention, on a CPU.

- float32: the largest difference of any logit (limit {LOGIT_LIMIT:g}, for mixtures of experts {ROUTED_LOGIT_LIMIT:g}).
  Greedy: whether {NUM_GREEDY} tokens drawn one a step are those that `transformers` picks.
- bfloat16: KL divergence in nats from the float32 reference, the mean over tokens (limit {KL_LIMIT:g}). For mixtures of
  experts the median: rounding changes the choice of experts where two are nearly equal. Last column: the same number
  for `transformers` itself in bfloat16.
- with images: the same three kinds of runs over prompts with images of unequal sizes in them; chunks and the hit end
  inside of images.
- paged: whole prompts side by side, of lengths around a page's borders. chunked: prompts in pieces that end inside, on
  and after a page, beside rows that decode. prefix hit: a prompt whose first pages another prompt computed.

| model | class in config.json | ranks | {" | ".join(COLUMNS)} | greedy | transformers bfloat16 |
|---|---|---|{"---|" * len(COLUMNS)}---|---|
"""


def text_rows(model: TinyModel, folder: Path) -> tuple[list[str], bool]:
    """The model's two lines of the table, and whether all is within the limits."""
    path = make_tiny(model, folder)
    record = PIPELINE_REGISTRY.retrieve_architecture(model.class_name)
    suite = Suite(record, path, huggingface_reference(path), model.routed)
    return rows_of(model.name, model.class_name, suite.run, _their_divergence(suite, path))


def vision_rows(name: str, family: VisionFamily, folder: Path) -> tuple[list[str], bool]:
    """The same for a family that sees images, over prompts with images in them."""
    lab = VisionLab(family, folder)
    return rows_of(f"{name}, with images", family.class_name, lab.run, lab.their_divergence())


def rows_of(
    name: str, class_name: str, run: Callable[[int, SupportedEncoding], list[Verdict]], theirs: float
) -> tuple[list[str], bool]:
    """One line for each number of ranks. theirs: divergence of transformers' own bfloat16."""
    lines, all_passed = [], True
    for num_ranks in (1, 2):
        verdicts = [
            verdict
            for encoding in (SupportedEncoding.float32, SupportedEncoding.bfloat16)
            for verdict in run(num_ranks, encoding)
        ]
        all_passed &= all(verdict.passed for verdict in verdicts)
        cells = [name, f"`{class_name}`", str(num_ranks), *map(_cell, verdicts)]
        greedy = all(verdict.greedy_equal is not False for verdict in verdicts)
        lines.append(f"| {' | '.join(cells)} | {'equal' if greedy else '**differ**'} | {theirs:.0e} |")
    return lines, all_passed


def _their_divergence(suite: Suite, path: Path) -> float:
    """Hugging Face's own bfloat16 against its float32, over the first case."""
    sequences = suite.sequences(CASES[0])
    return suite.divergence(huggingface_reference(path, torch.bfloat16)(sequences), suite.reference(sequences))


def _cell(verdict: Verdict) -> str:
    return f"{verdict.error:.0e}" if verdict.passed else f"**{verdict.error:.0e}**"


def main() -> int:
    """Exit status 1 where a number is over its limit (bold in the table)."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    lines, all_passed = [], True
    makers = [partial(text_rows, model) for model in TINY_MODELS]
    makers += [partial(vision_rows, name, family) for name, family in VISION_FAMILIES.items()]
    for make in makers:
        with TemporaryDirectory() as folder:
            rows, passed = make(Path(folder))
        print(*rows, sep="\n", flush=True)
        lines += rows
        all_passed &= passed
    FILE.write_text(HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n")
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
