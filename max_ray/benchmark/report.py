"""A report on the terminal, and in a file."""

from __future__ import annotations

import json
from pathlib import Path

from max_ray.benchmark.metrics import PERCENTILES, SCHEMA, Report
from max_ray.errors import ConfigError

_BUSY_CLIENT = 0.7  # of a core: above this the client's own waiting shows in the latencies
_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "end to end"}


def table(report: Report) -> str:
    """The report as lines for people."""
    requests, tokens, throughput = report["requests"], report["tokens"], report["throughput"]
    lines = [
        f"{report['label']}",
        f"  requests     {requests['succeeded']} of {requests['total']} succeeded in {report['duration_s']:.2f} s",
        f"  tokens       {tokens['input']} in, {tokens['output']} out, in {tokens['text_chunks']} chunks of text",
        f"  output       {throughput['output_tokens_per_s']:.2f} tokens/s",
        f"  total        {throughput['total_tokens_per_s']:.2f} tokens/s",
        f"               {throughput['requests_per_s']:.3f} requests/s",
        "",
        "  " + "".join(cell.rjust(12) for cell in ["ms", "mean", *(f"p{q}" for q in PERCENTILES)]),
        *(_latency_line(name, report["latency_ms"][name]) for name in _TITLES),
        "",
    ]
    return "\n".join([*lines, *_goodput_lines(report), *_client_lines(report), *_failure_lines(report)])


def _latency_line(name: str, spread: dict[str, float | None]) -> str:
    values = [spread[key] for key in ("mean", *(f"p{q}" for q in PERCENTILES))]
    return "  " + "".join(
        cell.rjust(12) for cell in [_TITLES[name], *("-" if v is None else f"{v:.2f}" for v in values)]
    )


def _goodput_lines(report: Report) -> list[str]:
    goodput = report["goodput"]
    if goodput is None:
        return []
    limits = ", ".join(f"{_TITLES[name]} <= {limit:g} ms" for name, limit in goodput["limits_ms"].items())
    return [f"  goodput      {goodput['requests_per_s']:.3f} requests/s ({goodput['share']:.1%}) with {limits}"]


def _client_lines(report: Report) -> list[str]:
    client = report["client"]
    per_read = "-" if client["cpu_us_per_read"] is None else f"{client['cpu_us_per_read']:.0f} us"
    lines = [f"  client       {client['cpu_share']:.1%} of a core, {per_read} a read"]
    if client["cpu_share"] > _BUSY_CLIENT:
        lines.append("  WARNING: the client was busy most of the time: it may be what was measured.")
    if report["requests"]["shorter_than_asked"]:
        lines.append(f"  shorter      {report['requests']['shorter_than_asked']} answers than asked for (--ignore-eos)")
    return lines


def _failure_lines(report: Report) -> list[str]:
    return [
        f"  FAILED       {entry['count']} x {kind}: {' '.join(entry['example'].split())}"
        for kind, entry in report["failures"].items()
    ]


def write_json(report: Report, path: Path) -> None:
    """Raises ConfigError where the file cannot be written."""
    try:
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def read_json(path: Path) -> Report:
    """A report that `write_json` wrote. Raises ConfigError for any other file."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ConfigError(f"{path} is no result of this version of `max-ray benchmark serving` (schema {SCHEMA}).")
    return report
