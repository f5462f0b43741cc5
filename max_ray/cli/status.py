"""`max-ray status`: the running server as a few lines, or as JSON; what `GET /v1/server` says."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from max_ray.cli.chat.client import Client, ServerError
from max_ray.cli.chat.command import add_server_flags
from max_ray.planning.memory_plan import aligned

_MAX_REQUESTS = 20
_TOP, _REST = "\x1b[H", "\x1b[J"
_LATENCIES = {
    "time_to_first_token_seconds": "first token",
    "inter_token_latency_seconds": "between tokens",
}


def add_status_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `max-ray status`."""
    add_server_flags(parser)
    parser.add_argument("--once", action="store_true", help="Print once and end.")
    parser.add_argument("--json", action="store_true", help="Print what GET /v1/server gives, an object a line.")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="Between two looks. Default: 1.")


def run_status(options: dict[str, Any]) -> None:
    """Shows the server until Ctrl-C. Raises ServerError when it does not answer, or is no server of max-ray."""
    client = Client(options["url"], options["api_key"])
    is_live = sys.stdout.isatty() and not options["json"] and not options["once"]
    before: Mapping[str, Any] | None = None
    if is_live:
        sys.stdout.write(_TOP + _REST)
    while True:
        now = _server(client)
        text = json.dumps(now) if options["json"] else status_text(now, before)
        print(f"{_TOP}{text}{_REST}" if is_live else text, flush=True)
        if options["once"]:
            return
        before = now
        time.sleep(max(0.05, options["interval"]))
        if not is_live and not options["json"]:
            print()


def _server(client: Client) -> Mapping[str, Any]:
    try:
        found: Any = client.get("/v1/server")
    except ServerError as error:
        if error.status != 404:
            raise
        found = None
    if not isinstance(found, dict) or found.get("object") != "server":
        raise ServerError(f"{client.root} is no server of max-ray: it has no /v1/server.")
    return found


def status_text(now: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> str:
    """The server as text.

    Args:
        now: What `GET /v1/server` gives.
        before: The same of an earlier moment; without it there are no tokens a second.
    """
    model, replicas = now["model"], now["replicas"]
    head = [
        f"{model['id']}  ({model['task']}, up to {model['max_model_len']} tokens)  "
        f"max-ray {now['version']}, up {_duration(now['uptime_s'])}",
        f"requests    {_sum(replicas, 'running')} running, {_sum(replicas, 'queued')} waiting, "
        f"{_sum(replicas, 'finished')} finished, {_sum(replicas, 'failed')} failed, "
        f"{_sum(replicas, 'rejected')} refused",
        f"tokens      {_sum(replicas, 'prompt_tokens')} in, {_sum(replicas, 'generated_tokens')} out"
        + (_rate(now, before) if before else ""),
    ]
    if _sum(replicas, "num_blocks"):
        used, total = _sum(replicas, "num_used_blocks"), _sum(replicas, "num_blocks")
        head.append(f"KV cache    {used} of {total} blocks ({used / total:.0%})")
    head += _latencies(now["latency"])
    return "\n".join([*head, "", _replica_table(replicas), *_request_table(now)])


def _sum(replicas: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(int(replica[name]) for replica in replicas)


def _rate(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    seconds = now["time"] - before["time"]
    made = _sum(now["replicas"], "generated_tokens") - _sum(before["replicas"], "generated_tokens")
    return f", {max(0, made) / seconds:.1f} tokens/s" if seconds > 0 else ""


def _latencies(latency: Mapping[str, Any]) -> list[str]:
    shown = {title: latency[name] for name, title in _LATENCIES.items() if latency.get(name, {}).get("count")}
    parts = [f"{title} p50 {_seconds(q['p50'])}, p99 {_seconds(q['p99'])}" for title, q in shown.items()]
    return [f"latency     {'; '.join(parts)}"] if parts else []


def _replica_table(replicas: Sequence[Mapping[str, Any]]) -> str:
    rows = [["replica", "state", "running", "waiting", "KV blocks", "workers"]]
    for one in replicas:
        group = one["group"]
        workers = f"{group['num_workers']} x {group['device']}" if group else "-"
        state = "healthy" if one["healthy"] else "down"
        blocks = f"{one['num_used_blocks']}/{one['num_blocks']}"
        rows.append([one["replica"], state, str(one["running"]), str(one["queued"]), blocks, workers])
    return aligned(rows)


def _request_table(now: Mapping[str, Any]) -> list[str]:
    if not now["requests"]:
        return []
    rows = [["request", "phase", "age", "prompt", "cached", "generated", "blocks"]]
    for one in now["requests"][:_MAX_REQUESTS]:
        counts = [str(one[name]) for name in ("prompt_tokens", "cached_tokens", "generated_tokens", "num_blocks")]
        rows.append([one["tag"], one["phase"], _seconds(one["age_s"]), *counts])
    left = now["num_requests"] - len(rows) + 1
    return ["", aligned(rows), *([f"and {left} more"] if left else [])]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
