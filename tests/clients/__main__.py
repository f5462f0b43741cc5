"""`python -m tests.clients`: installs the clients, starts a server, runs every call, writes docs/clients.md.

python -m tests.clients                     # all of it
python -m tests.clients langchain js        # some clients; prints the table, leaves the page as it is
python -m tests.clients --url http://127.0.0.1:8000   # against a server that runs already
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.clients import environments, report, server
from tests.source_tree import ROOT

PAGE = ROOT / "docs" / "clients.md"
CLIENT_TIMEOUT_S = 3600
# No client reports its use or looks for price lists.
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1", "HAYSTACK_TELEMETRY_ENABLED": "False"}


def main() -> int:
    """Returns 0 where every call works, else 1."""
    options = _options()
    options.environments.mkdir(parents=True, exist_ok=True)
    names = options.clients or environments.client_names()
    for name in names:
        print(f"Installing {name} ...", flush=True)
        _install(name, options.environments)
    with _server(options) as url:
        for name in names:
            run_client(name, url, options.environments)
    found = _written(options.environments)
    return int(any(result["outcome"] != "works" for result in found))


def _written(folder: Path) -> list[dict[str, Any]]:
    """Writes the page of all clients that have results; returns these."""
    names = [name for name in environments.client_names() if _results(name, folder).is_file()]
    found = [line for name in names for line in report.read_results(_results(name, folder))]
    versions = [version for name in names for version in environments.versions(name)]
    PAGE.write_text(report.render(found, versions), encoding="utf-8")
    return found


def _results(name: str, folder: Path) -> Path:
    return folder / f"{name}.jsonl"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("clients", nargs="*", choices=[[], *environments.client_names()], help="default: all")
    parser.add_argument("--url", help="a running server, without /v1; default: one is started")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "clients", help="folder of installations")
    return parser.parse_args()


def _server(options: argparse.Namespace) -> server.ServerContext:
    if options.url:
        return nullcontext(options.url)
    model = environments.smollm2(options.environments)
    return server.running_server(model, options.environments / "server.log")


def _install(name: str, folder: Path) -> None:
    if name == environments.JAVASCRIPT:
        environments.install_javascript(folder)
    else:
        environments.install_python(name, folder)


def run_client(name: str, url: str, folder: Path) -> None:
    """Runs a client's calls. One that ends before it wrote a line counts as a call that fails."""
    results = _results(name, folder)
    results.write_text("", encoding="utf-8")
    environment = {**os.environ, **QUIET, "URL": url, "MODEL": server.model_name(url), "PYTHONPATH": str(ROOT)}
    command = [str(folder / name / "bin" / "python"), "-W", "ignore", "-m", "tests.clients.harness", name, str(results)]
    where = ROOT
    if name == environments.JAVASCRIPT:
        command, where = ["node", "main.mjs", str(results)], folder / name
    print(f"Calls of {name} ...", flush=True)
    log = folder / f"{name}.log"
    ended = _logged(command, where, environment, log)
    if not results.stat().st_size:
        print(f"{name} ended before its first call: see {log}", flush=True)
        line = {"client": name, "call": "start", "judged_by": "it runs", "outcome": "fails", "why": ended}
        results.write_text(json.dumps(line) + "\n", encoding="utf-8")


def _logged(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> str:
    """Runs a program with its output in a file; says how it ended."""
    with log.open("w", encoding="utf-8") as output:
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=CLIENT_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no end after {CLIENT_TIMEOUT_S} s"
    return f"exit code {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
