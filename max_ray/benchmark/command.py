"""`max-ray benchmark serving|kernels|offline|plot`: flags, and what they call. Options come parsed.

The heavy parts are imported when their command runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from max_ray import settings as environment
from max_ray.benchmark.device_flags import add_kernel_flags, add_offline_flags
from max_ray.errors import ConfigError, MaxRayError

if TYPE_CHECKING:
    from max_ray.benchmark.metrics import Report


def add_commands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Adds the subcommands to the parser of `benchmark`, and gives them by name."""
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="KIND", parser_class=type(parser))
    serving = kinds.add_parser("serving", help="load for an OpenAI-compatible server", allow_abbrev=False)
    kernels = kinds.add_parser("kernels", help="each kernel against its reference and the machine", allow_abbrev=False)
    offline = kinds.add_parser(
        "offline", help="decode and prefill rates of a shape, in this process", allow_abbrev=False
    )
    drawing = kinds.add_parser("plot", help="results of several servers side by side, as a PNG", allow_abbrev=False)
    _add_server_flags(serving)
    _add_load_flags(serving)
    _add_data_flags(serving)
    _add_output_flags(serving)
    add_kernel_flags(kernels)
    add_offline_flags(offline)
    drawing.add_argument("results", nargs="+", metavar="FILE.json", help="What `serving --json` wrote.")
    drawing.add_argument("--output", required=True, metavar="FILE.png", help="The picture to write.")
    return {"serving": serving, "kernels": kernels, "offline": offline, "plot": drawing}


def run(options: dict[str, Any]) -> None:
    """Runs the subcommand named in `options["benchmark"]`. Raises MaxRayError."""
    {"serving": _serving, "kernels": _kernels, "offline": _offline, "plot": _plot}[options.pop("benchmark")](options)


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--base-url", required=True, metavar="URL", help="Root of the server, with or without /v1.")
    add("--model", metavar="NAME", help="Model to ask for (default: the first that the server lists).")
    add("--api-key-env", metavar="NAME", help="Environment variable that holds the API key.")
    add("--endpoint", default="completions", help="completions or chat. Default: completions.")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="Limit of one request. Default: 600.")


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("load (--request-rate or --max-concurrency)").add_argument
    add("--request-rate", type=float, metavar="R", help="Requests a second, Poisson arrivals; inf: all at once.")
    add("--max-concurrency", type=int, metavar="N", help="Keep N requests under way.")
    add("--num-prompts", type=int, default=100, metavar="N", help="Conversations to send. Default: 100.")
    add("--num-warmups", type=int, default=1, metavar="N", help="Requests sent before, not measured. Default: 1.")
    add("--temperature", type=float, default=0.0, metavar="FLOAT", help="0 is greedy. Default: 0.")
    add("--ignore-eos", action="store_true", help="Ask for answers of full length (not every server can).")
    add("--seed", type=int, default=0, metavar="INT", help="Of data, arrivals and draws. The same data twice meets "
        "the server's prefix cache. Default: 0.")  # fmt: skip


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="random", help="random, shared-prefix, multi-turn or sharegpt. Default: random.")
    add("--input-len", type=int, metavar="N", help="Prompt tokens (of each turn).")
    add("--output-len", type=int, metavar="N", help="Tokens to ask for (sharegpt: as long as the file's answers).")
    add("--prefix-len", type=int, metavar="N", help="shared-prefix: so many of --input-len are the same for all.")
    add("--turns", type=int, metavar="N", help="multi-turn, sharegpt: turns of a conversation.")
    add("--dataset-path", metavar="FILE", help="sharegpt: the JSON file.")
    add("--max-total-len", type=int, metavar="N", help="sharegpt: leave out conversations of more tokens.")
    add("--tokenizer", metavar="DIR", help="Model folder, for exact token counts; without, a word counts as one.")


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("results").add_argument
    add("--goodput", action="append", default=[], metavar="METRIC:MS", help="Limit that a good request keeps: "
        "ttft, tpot or e2e. May be repeated.")  # fmt: skip
    add("--label", metavar="TEXT", help="Name of this run in tables and plots.")
    add("--json", metavar="FILE", help="Write the report.")
    add("--plot", metavar="FILE.png", help="Draw the report (needs matplotlib).")


def _serving(options: dict[str, Any]) -> None:
    from max_ray.benchmark import plot, report, serving
    from max_ray.benchmark.datasets import DataSettings
    from max_ray.benchmark.load import Pace
    from max_ray.benchmark.metrics import parse_goodput

    json_path, plot_path, key = options.pop("json"), options.pop("plot"), _api_key(options.pop("api_key_env"))
    if plot_path:
        plot.require_matplotlib()
    seed = options.pop("seed")
    data = {name: options.pop(name) for name in DataSettings.__dataclass_fields__ if name != "seed"}
    settings = serving.ServingSettings(
        data=DataSettings(**data, seed=seed),
        pace=Pace(options.pop("request_rate"), options.pop("max_concurrency"), seed),
        timeout_s=options.pop("timeout"),
        goodput=parse_goodput(options.pop("goodput")),
        **options,
    )
    measured = serving.run(settings, key)
    print(report.table(measured))
    if json_path:
        report.write_json(measured, Path(json_path))
    if plot_path:
        plot.plot([measured], Path(plot_path))
    _check_any_success(measured)


def _check_any_success(measured: Report) -> None:
    if not measured["requests"]["succeeded"]:
        raise MaxRayError("No request succeeded: nothing was measured.")


def _kernels(options: dict[str, Any]) -> None:
    from max_ray.benchmark import kernels

    kernels.run(options)


def _offline(options: dict[str, Any]) -> None:
    from max_ray.benchmark import offline

    offline.run(options)


def _plot(options: dict[str, Any]) -> None:
    from max_ray.benchmark import plot, report

    plot.plot([report.read_json(Path(path)) for path in options["results"]], Path(options["output"]))


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = environment.variable(variable)
    if key is None:
        raise ConfigError(f"--api-key-env names {variable}, and that environment variable is not set.")
    return key
