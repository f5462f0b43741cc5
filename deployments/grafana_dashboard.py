"""Makes the Grafana dashboard: `python -m deployments.grafana_dashboard > deployments/configs/grafana/max_ray.json`.

The variable `source` picks where the numbers come from: `/metrics` of the application, or Ray's own Prometheus
endpoint, whose names have `ray_` in front.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SOURCES = {"/metrics": "max_ray", "Ray": "ray_max_ray"}
"""Values of the variable `source`: how the names of metrics begin."""
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_REPLICA = '{model_name=~"$model",replica=~"$replica"}'
_ROUTE = '{model_name=~"$model",replica=~"$replica",route=~"$route"}'
_WINDOW = "[$__rate_interval]"
_WIDTH, _HEIGHT = 8, 8
_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One graph.

    Args:
        title: Above it.
        text: What it shows, for the tooltip.
        unit: Grafana's name of the unit: "s", "short", "percentunit", "reqps".
        queries: (PromQL, legend).
        is_stacked: Whether the lines add up.
    """

    title: str
    text: str
    unit: str
    queries: Sequence[tuple[str, str]]
    is_stacked: bool = False


def _rate(name: str, labels: str = _REPLICA) -> str:
    return f"rate(${{source}}_{name}{labels}{_WINDOW})"


def _quantiles(name: str, labels: str = _ROUTE) -> list[tuple[str, str]]:
    buckets = f"sum by (le) ({_rate(f'{name}_bucket', labels)})"
    return [(f"histogram_quantile({share}, {buckets})", f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)]


def _quantile_by_route(name: str) -> list[tuple[str, str]]:
    return [(f"histogram_quantile(0.95, sum by (le, route) ({_rate(f'{name}_bucket', _ROUTE)}))", "{{route}}")]


def _mean(name: str, labels: str = _ROUTE) -> str:
    return f"sum({_rate(f'{name}_sum', labels)}) / sum({_rate(f'{name}_count', labels)})"


def _sums(**names: str) -> list[tuple[str, str]]:
    """One line a counter: legend -> name."""
    return [(f"sum({_rate(name)})", legend.replace("_", " ")) for legend, name in names.items()]


def _gauge(name: str) -> str:
    return f"${{source}}_{name}{_REPLICA}"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Traffic": (
        Panel(
            "Requests",
            "HTTP requests by route and status.",
            "reqps",
            [(f"sum by (route, status) ({_rate('requests_total', _ROUTE)})", "{{route}} {{status}}")],
        ),
        Panel(
            "Tokens",
            "Tokens a second. Cached: prompt tokens from the prefix cache.",
            "short",
            _sums(prompt="prompt_tokens_total", generated="generated_tokens_total", cached="prefix_hit_tokens_total"),
        ),
        Panel(
            "Ends",
            "Choices by the reason of their end.",
            "reqps",
            [(f"sum by (finished_reason) ({_rate('request_success_total', _ROUTE)})", "{{finished_reason}}")],
        ),
        Panel(
            "Refused, failed, cancelled",
            "Requests that did not end well. Rejected: the queue was full.",
            "reqps",
            _sums(
                rejected="rejected_requests_total", failed="failed_requests_total", cancelled="cancelled_requests_total"
            ),
        ),
        Panel("Prompt length", "Tokens of a prompt.", "short", _quantiles("request_prompt_tokens")),
        Panel("Answer length", "Tokens of an answer.", "short", _quantiles("request_generation_tokens")),
    ),
    "Latency": (
        Panel("Time to first token", "From the arrival.", "s", _quantiles("time_to_first_token_seconds")),
        Panel("Inter-token latency", "Between two tokens.", "s", _quantiles("inter_token_latency_seconds")),
        Panel("End to end", "From the arrival to the last token.", "s", _quantiles("e2e_request_latency_seconds")),
        Panel(
            "Time by phase",
            "Means of the phases of a choice.",
            "s",
            [(_mean(f"request_{phase}_time_seconds"), phase) for phase in ("queue", "prefill", "decode")],
            is_stacked=True,
        ),
        Panel("Queue time", "Up to the first KV blocks.", "s", _quantiles("request_queue_time_seconds")),
        Panel(
            "Prefill time",
            "Up to the first token.",
            "s",
            _quantiles("request_prefill_time_seconds"),
        ),
        Panel(
            "Time per output token",
            "Decode time of a request by its tokens after the first one.",
            "s",
            _quantiles("request_time_per_output_token_seconds"),
        ),
        Panel("Time to first token by route, p95", "", "s", _quantile_by_route("time_to_first_token_seconds")),
        Panel("End to end by route, p95", "", "s", _quantile_by_route("e2e_request_latency_seconds")),
        Panel("HTTP duration by route, p95", "Of all routes.", "s", _quantile_by_route("request_duration_seconds")),
    ),
    "Scheduler": (
        Panel(
            "Requests running and waiting",
            "",
            "short",
            [(f"sum({_gauge('running_requests')})", "running"), (f"sum({_gauge('queued_requests')})", "waiting")],
        ),
        Panel(
            "Oldest waiting request", "Its age.", "s", [(f"max({_gauge('oldest_queued_request_seconds')})", "oldest")]
        ),
        Panel(
            "Batch size",
            "Requests that gained tokens in a model step.",
            "short",
            [(_mean("batch_size", _REPLICA), "mean"), *_quantiles("batch_size", _REPLICA)[1:2]],
        ),
        Panel(
            "Steps",
            "Model steps and runs a second. Extended and interrupted: runs in progress.",
            "short",
            _sums(
                steps="steps_total",
                runs="runs_total",
                decisions="scheduler_decisions_total",
                extended="run_extensions_total",
                interrupted="run_interrupts_total",
            ),
        ),
        Panel("Preemptions", "Requests that lost their KV blocks.", "short", _sums(preempted="preemptions_total")),
        Panel(
            "Preemptions by route",
            "",
            "short",
            [(f"sum by (route) ({_rate('request_preemptions_total', _ROUTE)})", "{{route}}")],
        ),
    ),
    "KV cache": (
        Panel(
            "KV cache use",
            "Share of the blocks that running requests hold, by replica.",
            "percentunit",
            [(f"{_gauge('kv_blocks_used')} / {_gauge('kv_blocks_capacity')}", "{{replica}}")],
        ),
        Panel(
            "Prefix hit rate",
            "Share of prompt tokens that came from the prefix cache.",
            "percentunit",
            [(f"sum({_rate('prefix_hit_tokens_total')}) / sum({_rate('prompt_tokens_total')})", "hit rate")],
        ),
        Panel(
            "Prefix cache blocks",
            "Blocks found, looked up in vain, and given new contents.",
            "short",
            _sums(
                hits="prefix_cache_hits_total",
                misses="prefix_cache_misses_total",
                evictions="prefix_cache_evictions_total",
            ),
        ),
        Panel(
            "Prefix hit rate by route",
            "Share of prompt tokens that came from the prefix cache.",
            "percentunit",
            [
                (
                    f"sum by (route) ({_rate('request_cached_tokens_sum', _ROUTE)})"
                    f" / sum by (route) ({_rate('request_prompt_tokens_sum', _ROUTE)})",
                    "{{route}}",
                )
            ],
        ),
    ),
    "Replicas": (
        Panel("Replicas", "That report.", "short", [(f"count({_gauge('running_requests')})", "replicas")]),
        Panel(
            "Tokens by replica",
            "Generated a second.",
            "short",
            [(f"sum by (replica) ({_rate('generated_tokens_total')})", "{{replica}}")],
        ),
        Panel(
            "Recoveries",
            "Attempts to bring failed workers back.",
            "short",
            [(f"sum by (replica) ({_gauge('worker_group_recoveries_total')})", "{{replica}}")],
        ),
        Panel(
            "Start-up phases",
            "Of the slowest replica.",
            "s",
            [(f"max by (phase) ({_gauge('startup_phase_seconds')})", "{{phase}}")],
        ),
    ),
}


def build_dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        position = {"h": 1, "w": _WIDTH * _COLUMNS, "x": 0, "y": y}
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": position,
                "panels": [],
            }
        )
        y += 1
        for number, panel in enumerate(row):
            place = (number % _COLUMNS * _WIDTH, y + number // _COLUMNS * _HEIGHT)
            panels.append(_panel(len(panels) + 1, panel, *place))
        y += -(-len(row) // _COLUMNS) * _HEIGHT
    return {
        "uid": "max-ray",
        "title": "max_ray",
        "tags": ["max_ray", "LLM"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
    custom = {"fillOpacity": 20 if panel.is_stacked else 5, "showPoints": "never", "stacking": stacking}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": _DATASOURCE, "expr": query, "legendFormat": legend}
            for place, (query, legend) in enumerate(panel.queries)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    options = [
        {"text": text, "value": value, "selected": number == 0} for number, (text, value) in enumerate(SOURCES.items())
    ]
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "source",
            "label": "Metrics from",
            "type": "custom",
            "query": ",".join(f"{text} : {value}" for text, value in SOURCES.items()),
            "options": options,
            "current": options[0],
        },
        _label_variable("model", "Model", "${source}_running_requests", "model_name"),
        _label_variable("replica", "Replica", '${source}_running_requests{model_name=~"$model"}', "replica"),
        _label_variable("route", "Route", '${source}_requests_total{model_name=~"$model"}', "route"),
    ]


def _label_variable(name: str, title: str, series: str, label: str) -> dict[str, Any]:
    query = f"label_values({series}, {label})"
    return {
        "name": name,
        "label": title,
        "type": "query",
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    print(json.dumps(build_dashboard(), indent=2))
