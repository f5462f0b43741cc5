"""`architectures/FAMILIES.md`: what it lists as served is served, and some of its lines in seconds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.architectures.family_rows import ROWS
from tests.architectures.family_table import FILE, MOST_REFUSED, line_of, main


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def listed() -> dict[tuple[str, str], str]:
    """(family, class) -> result, as the committed table has them."""
    lines = [line.split(" | ") for line in FILE.read_text(encoding="utf-8").splitlines() if re.match(r"\| .*`", line)]
    return {(cells[0].removeprefix("| "), cells[1].strip("`")): cells[3] for cells in lines}


def test_the_table_has_every_family() -> None:
    table = listed()
    assert len(ROWS) == 80
    assert set(table) == {(row.name, row.class_name) for row in ROWS}
    assert set(table.values()) == {"served", "refused"}


@pytest.mark.parametrize(
    ("class_name", "result", "said"),
    [
        ("InternLM3ForCausalLM", "served", "`LlamaForCausalLM`"),
        ("Olmo2ForCausalLM", "served", "`TransformersForCausalLM`"),
        ("Gemma3ForConditionalGeneration", "served", "`Gemma3ForCausalLM`"),
        ("Qwen3Model", "served", "`Qwen3ForCausalLM`"),
        ("JambaForCausalLM", "refused", "cannot run on a paged cache: it has layers of linear_attention"),
        ("BaichuanForCausalLM", "refused", "No architecture BaichuanForCausalLM is known"),
    ],
)
def test_a_line(class_name: str, result: str, said: str) -> None:
    line = line_of(next(row for row in ROWS if row.class_name == class_name))
    assert line.result == result
    assert said in line.by


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_line_is_as_committed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    committed = listed()
    monkeypatch.setattr("tests.architectures.family_table.FILE", tmp_path / "FAMILIES.md")
    monkeypatch.setattr("tests.architectures.test_family_table.FILE", tmp_path / "FAMILIES.md")
    main([])
    assert listed() == committed
    assert sum(result == "refused" for result in committed.values()) <= MOST_REFUSED
