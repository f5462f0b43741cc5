"""`docs/clients.md`: which call of which client works."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HEAD = """# Clients

Calls of well-known clients against `max-ray serve` with SmolLM2-135M-Instruct (GGUF, Q4_1), in their default way.
A call works when its answer has the right content: *checked* says what of it. The calls are in `tests/clients`;
`make test-clients` runs them and writes this page.
"""
MAX_WHY = 300  # characters


def read_results(path: Path) -> list[dict[str, Any]]:
    """Lines that `harness.py` and `harness.mjs` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def render(results: Sequence[dict[str, Any]], versions: Iterable[str]) -> str:
    """The page, in Markdown.

    Args:
        results: what `read_results` gives, of all clients.
        versions: packages with their versions.
    """
    working = sum(result["outcome"] == "works" for result in results)
    clients = len({result["client"] for result in results})
    summary = f"{len(results)} calls of {clients} clients: {working} work, {len(results) - working} fail."
    rows = [_row(result) for result in results]
    table = ["| client | call | checked | result |", "|---|---|---|---|", *rows]
    packages = ", ".join(f"`{version}`" for version in versions)
    return "\n".join([HEAD, f"**{summary}**", "", *table, "", "## Versions", "", packages, ""])


def _row(result: dict[str, Any]) -> str:
    outcome = "works"
    if result["outcome"] != "works":
        outcome = f"**fails**: {_cell(result['why'])[:MAX_WHY]}"
    return f"| {_cell(result['client'])} | {_cell(result['call'])} | {_cell(result['judged_by'])} | {outcome} |"


def _cell(text: str) -> str:
    """Text on one line that does not end its cell and is no markup."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line.replace("<", "&lt;").replace("_", "\\_").replace("*", "\\*")
