"""What loaded models hold against their plans, over shapes and encodings, each in a process of its own; a table.

python -m pytest -m slow -s tests/benchmark/test_memory_table.py
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from max_ray.benchmark.aligned import line
from max_ray.benchmark.memory import _HEAD, _WIDTHS, Held, measure_apart
from max_ray.kernels import native
from tests.checkpoints import make_llama
from tests.gguf_files import make_gguf

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]
# About 110 million weights each: 5 % are clearly more than what a process gains by itself.
WIDE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 8192}
DEEP: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 4096}
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K", "output": "Q6_K"}


@pytest.fixture(scope="module")
def table() -> Iterator[list[Held]]:
    """Prints what was measured at the end."""
    rows: list[Held] = []
    yield rows
    print("\n" + "\n".join([line(_HEAD, _WIDTHS), *(line(held.cells(), _WIDTHS) for held in rows)]))


def check(held: Held, table: list[Held], most_of_file: float | None = None) -> None:
    table.append(held)
    assert 0.95 <= held.of_planned <= 1.05, held
    if most_of_file is not None and native.library() is not None:
        assert held.weights_of_file <= most_of_file, held


@pytest.mark.parametrize("name", ["wide", "deep", "tied"])
def test_plain_and_quantized_while_read(name: str, tmp_path: Path, table: list[Held]) -> None:
    shape = {"wide": WIDE, "deep": DEEP, "tied": {**WIDE, "tie_word_embeddings": True}}[name]
    folder = make_llama(tmp_path / name, **shape, **HEADS, dtype=torch.bfloat16)
    for encoding in ("bfloat16", "float32", "q4_k", "q8_0") if name == "wide" else ("bfloat16", "q4_k"):
        check(measure_apart(str(folder), encoding), table)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("default", "types", "most"),
    [
        ("Q4_K", {}, 1.15),
        ("Q4_K", MIXED, 1.25),
        ("Q8_0", {}, 1.15),
        ("Q5_K", {}, 1.15),
        ("Q6_K", {}, 1.15),
        ("Q4_0", {}, 1.15),
    ],
)
def test_gguf(default: str, types: dict[str, str], most: float, tmp_path: Path, table: list[Held]) -> None:
    name = f"{default}{'_M' if types else ''}"
    path = make_gguf(tmp_path / f"{name}.gguf", types, default=default, **WIDE, **HEADS)
    shutil.rmtree(tmp_path / f"{name}-hf")
    check(measure_apart(str(path), None), table, most)
