"""Several results side by side, as a PNG: throughput, then each latency at p50, p90 and p99.

Needs matplotlib, the optional extra `benchmark`; it is imported here only when a plot is drawn.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from max_ray.benchmark.metrics import PERCENTILES, Report
from max_ray.errors import ConfigError

_LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "itl": "gap between chunks"}
_LATENCIES |= {"e2e": "end to end"}


@dataclass(frozen=True)
class Panel:
    """One bar chart: values[i][j] is that of server i in group j; None where it was not measured."""

    title: str
    unit: str
    groups: list[str]
    values: list[list[float | None]]


def panels(reports: Sequence[Report]) -> list[Panel]:
    """What is drawn."""
    throughput = [
        [report["throughput"]["output_tokens_per_s"], report["throughput"]["total_tokens_per_s"]] for report in reports
    ]
    points = [f"p{q}" for q in PERCENTILES]
    return [
        Panel("throughput", "tokens/s", ["output", "total"], throughput),
        *(
            Panel(title, "ms", points, [[report["latency_ms"][name][p] for p in points] for report in reports])
            for name, title in _LATENCIES.items()
        ),
    ]


def shown(value: float | None) -> str:
    """Three digits, and all of them before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def require_matplotlib() -> Any:
    """`matplotlib.figure`. Raises ConfigError that says how to get it."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ConfigError("Plots need matplotlib: pip install 'max_ray[benchmark]' (or matplotlib itself).") from None


def plot(reports: Sequence[Report], path: Path) -> None:
    """Draws and writes. Raises ConfigError without matplotlib, or where the file cannot be written."""
    drawn = panels(reports)
    figure = require_matplotlib().Figure(figsize=(3.2 * len(drawn), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
        _draw(axes, panel)
    figure.legend([report["label"] for report in reports], loc="outside lower center")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def _draw(axes: Any, panel: Panel) -> None:
    width = 0.8 / len(panel.values)
    for server, values in enumerate(panel.values):
        places = [group - 0.4 + (server + 0.5) * width for group in range(len(panel.groups))]
        bars = axes.bar(places, [value or 0.0 for value in values], width)
        axes.bar_label(bars, [shown(value) for value in values], fontsize=7)
    axes.set_title(f"{panel.title} ({panel.unit})", fontsize=10)
    axes.set_xticks(range(len(panel.groups)), panel.groups)
