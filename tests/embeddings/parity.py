"""Writes the embedders' parity table: `python -m tests.embeddings.parity` runs the tiny models of `checkpoints.py` on 1
and 2 ranks in three encodings, and puts the results into `architectures/PARITY_EMBEDDINGS.md`. Takes under a minute."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers

from max_ray.pipelines import PIPELINE_REGISTRY
from tests.embeddings.checkpoints import FAMILIES, Vectors, make_encoder, random_rows, reference_vectors
from tests.embeddings.in_process import embed_in_process, register_families

FILE = Path(__file__).parents[2] / "architectures" / "PARITY_EMBEDDINGS.md"
LIMIT, COSINE_LIMIT = 1e-4, 1e-3
HEAD = f"""# Parity of embeddings with Hugging Face

Written by `python -m tests.embeddings.parity`; do not edit by hand. Each row is one tiny random checkpoint
(`tests/embeddings/checkpoints.py`), run by the embeddings pipeline on 1 or 2 tensor-parallel ranks, beside
`transformers` {{version}} in float32 with plain attention, one text at a time, on a CPU. Vectors are pooled, and not
normalized.

- together: texts of 1, 1, 2, 7, 7, 16, 17 tokens and of the model's whole length in one step. alone: a text a step.
- float32: the largest difference of any number (limit {LIMIT:g}). bfloat16, float16: 1 - cosine of the angle between
  the two vectors, the largest of the texts (limit {COSINE_LIMIT:g}).

| model | ranks | float32 together | float32 alone | bfloat16 | float16 |
|---|---|---|---|---|---|
"""


def pooling_of(name: str) -> str:
    """The pooling that models of the kind are trained with."""
    return (
        "lasttoken"
        if name.startswith(("qwen", "gte-qwen", "e5-mistral"))
        else "cls"
        if name == "modern_bert"
        else "mean"
    )


def lengths_of(name: str) -> list[int]:
    """One token; equal lengths apart from each other; edges of the scratch cache's blocks; the longest there is."""
    return [7, 1, 16, 7, 17, 2, FAMILIES[name].max_length, 1]


def largest_difference(ours: Vectors, expected: Vectors) -> float:
    return float(np.abs(ours - expected).max())


def largest_turn(ours: Vectors, expected: Vectors) -> float:
    """1 - cosine, of the worst text."""
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(expected, axis=1)
    return float(1 - ((ours * expected).sum(1) / lengths).min())


def numbers_of(name: str, folder: Path, rows: Sequence[list[int]], expected: Vectors, ranks: int) -> list[float]:
    """The columns of the table from "float32 together" on."""

    def ours(**settings: Any) -> Vectors:
        return embed_in_process(folder, rows, tensor_parallel_size=ranks, **settings)

    float32 = [largest_difference(ours(**settings), expected) for settings in ({}, {"max_batch_size": 1})]
    return float32 + [largest_turn(ours(quantization_encoding=e), expected) for e in ("bfloat16", "float16")]


def are_within_limits(numbers: Sequence[float]) -> bool:
    limits = (LIMIT, LIMIT, COSINE_LIMIT, COSINE_LIMIT)
    return all(number < limit for number, limit in zip(numbers, limits, strict=True))


def measure(name: str, folder: Path) -> dict[int, list[float]]:
    """The numbers of a tiny model by ranks."""
    make_encoder(folder, name, pooling=pooling_of(name), normalize=False)
    rows = random_rows(lengths_of(name))
    expected = reference_vectors(folder, rows, name, pooling_of(name), normalize=False)
    assert np.abs(expected).max() > 0.1, "vectors of which something can be seen"
    return {ranks: numbers_of(name, folder, rows, expected, ranks) for ranks in (1, *FAMILIES[name].ranks)}


def main() -> int:
    """Exit status 1 where a number is over its limit (bold in the table)."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    register_families()
    lines, all_passed = [], True
    for name in FAMILIES:
        with TemporaryDirectory() as folder:
            measured = measure(name, Path(folder) / "model")
        for ranks, numbers in measured.items():
            passed = are_within_limits(numbers)
            cells = [f"{number:.0e}" if passed else f"**{number:.0e}**" for number in numbers]
            lines.append(f"| {' | '.join([name, str(ranks), *cells])} |")
            all_passed &= passed
            print(lines[-1], flush=True)
    FILE.write_text(HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n")
    PIPELINE_REGISTRY.reset()
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
