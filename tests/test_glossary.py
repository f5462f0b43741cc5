"""The words that the glossary rules out stand nowhere in the three packages and in the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.source_tree import PACKAGES, ROOT

GLOSSARY = ROOT / "docs" / "glossary.md"
HISTORY = {ROOT / "max_ray" / "benchmark" / "LOG.md"}  # entries are not edited


def ruled_out() -> list[str]:
    """The left column of the glossary's last table; X and Y stand for any words."""
    table = GLOSSARY.read_text(encoding="utf-8").split("## Words we do not use")[1]
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)[1:]
    return [phrase.removesuffix(" X to Y") for cell in cells for phrase in cell.split(", ")]


def texts() -> Iterator[Path]:
    for package in PACKAGES:
        yield from (ROOT / package).rglob("*.py")
        yield from (ROOT / package).rglob("*.md")
    yield from (ROOT / "docs").rglob("*.md")
    yield from ROOT.glob("*.md")


def test_the_table_is_read() -> None:
    assert {"nobody", "the way of", "where there is none", "twin"} <= set(ruled_out())


def test_words_that_are_ruled_out_stand_nowhere() -> None:
    words = re.compile(rf"\b(?:{'|'.join(map(re.escape, ruled_out()))})s?\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in texts()
        if path != GLOSSARY and path not in HISTORY
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in words.finditer(line)
    ]
    assert found == []
