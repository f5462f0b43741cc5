"""The benchmark of checkpoints by turns, over two tiny ones.

python -m pytest tests/benchmark/test_checkpoints.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from max_ray.benchmark.checkpoints import main
from tests.checkpoints import make_llama


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rates_of_each_model_and_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(make_llama(tmp_path / name, tokenizer=False)) for name in ("a", "b")]
    assert main([*models, "--batch", "1,2", "--context", "8", "--steps", "3", "--rounds", "1"]) == 0
    rows = [text.split() for text in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0][-1], row[2]) for row in rows] == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]
    assert all(float(row[3]) > 0 and float(row[4]) >= float(row[3]) for row in rows)
    assert [row[5] for row in rows[1::2]] == ["1.00", "1.00"]


def test_mistakes_are_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([str(tmp_path), "--batch", "0"]) == 2
    assert "1,8,64" in capsys.readouterr().err
