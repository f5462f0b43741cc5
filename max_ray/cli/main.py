"""The command line `max-ray`: serve, run, chat, status, generate, batch, encode, plan, pull and others.

It parses, builds the configuration, and calls.

Flags are made from the fields of PipelineConfig and ServeConfig, so names, defaults and help are written once, there.
Values stay text until the configuration reads them. A user's mistake is one sentence on stderr and exit code 2.
Heavy imports (torch, Ray) happen in the command that needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import max_ray
from max_ray import settings
from max_ray.benchmark import command as benchmark
from max_ray.chaos import command as chaos
from max_ray.cli.batch import FLAGS as BATCH_FLAGS
from max_ray.cli.batch import add_batch_flags, run_batch
from max_ray.cli.chat.command import add_chat_flags, add_run_flags, run_chat, run_model, serve_flags
from max_ray.cli.encode import FLAGS as ENCODE_FLAGS
from max_ray.cli.encode import add_encode_flags, run_encode
from max_ray.cli.flags import POOLED_SETTINGS, add_setting, add_settings
from max_ray.cli.generate import FLAGS as GENERATE_FLAGS
from max_ray.cli.generate import add_generate_flags, run_generate
from max_ray.cli.keys import add_key_commands, run_keys
from max_ray.cli.model_commands import add_pull_flags, run_plan, run_pull, run_warm_cache
from max_ray.cli.status import add_status_flags, run_status
from max_ray.config import Origins, PipelineConfig, ServeConfig, load_config
from max_ray.errors import ConfigError, MaxRayError, ServerFailedError, nearest
from max_ray.log import setup_logging
from max_ray.serve.serve_config import DEMO_MODEL, load_serve_config

_COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("serve a model over HTTP", "serve --model-path model-Q4_K_M.gguf --port 8080"),
    "run": ("chat with a model, serving it if needed", "run owner/name"),
    "chat": ("chat with a server", "chat --url http://127.0.0.1:8000 --system 'Answer in one sentence.'"),
    "status": ("show a running server", "status --once"),
    "generate": ("answer a prompt in this process", "generate --model-path DIR --prompt 'Why is the sky blue?'"),
    "encode": ("make vectors of texts in this process", "encode --model-path DIR 'a text' 'another one'"),
    "batch": ("answer a file of requests in this process", "batch in.jsonl out.jsonl --model-path DIR"),
    "plan": ("say what memory a model needs", "plan --model-path DIR --max-length 8192"),
    "pull": ("download a model from the Hugging Face hub", "pull owner/name:Q4_K_M"),
    "warm-cache": ("fetch a model and check it", "warm-cache --model-path owner/name"),
    "list": ("list the model families", "list --json"),
    "check": ("hold a model family against its reference", "check ./my_model --model-path DIR"),
    "benchmark": ("measure a server, draw the results", "benchmark serving --base-url http://127.0.0.1:8000"),
    "chaos": ("kill processes of a local server under load", "chaos --duration 60 --seed 7"),
    "keys": ("make API keys", "keys new alice"),
    "version": ("print the version", "version"),
}
"""Name -> what it does, and an example without `max-ray`."""


class UsageError(ConfigError):
    """A command line that cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `max-ray`. Gives the exit code: 0, 1 when a server failed by itself, 2 after a user's mistake, 130
    after Ctrl-C, 141 (as a shell calls SIGPIPE) when the output is not read any longer."""
    try:
        options = _parse(list(sys.argv[1:] if arguments is None else arguments))
        setup_logging(settings.log_level())
        run = {
            "serve": _serve,
            "run": _run,
            "chat": run_chat,
            "status": run_status,
            "generate": _generate,
            "encode": _encode,
            "batch": _batch,
            "plan": lambda given: run_plan(given, {"model_path": str(DEMO_MODEL)}),
            "pull": run_pull,
            "warm-cache": run_warm_cache,
            "list": _list,
            "check": _check,
            "benchmark": benchmark.run,
            "chaos": chaos.run,
            "keys": run_keys,
            "version": _version,
        }
        run[options.pop("command")](options)
        sys.stdout.flush()
    except MaxRayError as error:
        print(f"max-ray: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ServerFailedError) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read our output has ended: `max-ray list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 141
    return 0


def _parse(arguments: list[str]) -> dict[str, Any]:
    """The given options only, by setting name. Raises UsageError that names the nearest flag."""
    parser, commands = build_parser()
    known, unknown = parser.parse_known_args(arguments)
    options = vars(known)
    if unknown:
        command = " ".join(options[name] for name in ("command", "benchmark", "keys") if name in options)
        flags = [flag for action in commands[command]._actions for flag in action.option_strings]
        flag = unknown[0].partition("=")[0]
        raise UsageError(f"max-ray {command} has no option {flag!r}.{nearest(flag, flags)}")
    return options


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and the parsers of the commands by name."""
    parser = _Parser(prog="max-ray", description=max_ray.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=max_ray.__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    commands = {name: _command(subparsers, name) for name in _COMMANDS}
    for name, kind in benchmark.add_commands(commands["benchmark"]).items():
        commands[f"benchmark {name}"] = kind
    for name, kind in add_key_commands(commands["keys"]).items():
        commands[f"keys {name}"] = kind
    chaos.add_flags(commands["chaos"])
    add_settings(commands["serve"], ServeConfig, print_config=True, repeated=("model_path",))
    add_run_flags(commands["run"])
    add_settings(commands["run"], ServeConfig, [name for name in ServeConfig.model_fields if name != "model_path"])
    add_chat_flags(commands["chat"])
    add_status_flags(commands["status"])
    add_generate_flags(commands["generate"])
    add_settings(commands["generate"], PipelineConfig, print_config=True)
    add_encode_flags(commands["encode"])
    add_settings(commands["encode"], PipelineConfig, POOLED_SETTINGS)
    add_batch_flags(commands["batch"])
    add_settings(commands["batch"], PipelineConfig)
    commands["plan"].add_argument("--json", action="store_true", help="machine-readable")
    add_settings(commands["plan"], PipelineConfig)
    add_pull_flags(commands["pull"])
    for name in ("model_path", "revision", "custom_architectures"):
        add_setting(commands["warm-cache"], name, PipelineConfig.model_fields[name])
    commands["list"].add_argument("--json", action="store_true", help="machine-readable")
    family = "A folder with a list ARCHITECTURES, an installed module, or a name that max-ray list has."
    commands["check"].add_argument("family", help=family)
    commands["check"].add_argument("--model-path", required=True, metavar="PATH", help="A checkpoint of that family.")
    add_setting(commands["list"], "custom_architectures", PipelineConfig.model_fields["custom_architectures"])
    return parser, commands


def _command(subparsers: Any, name: str) -> argparse.ArgumentParser:
    text, example = _COMMANDS[name]
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=text,
        description=f"{text[:1].upper()}{text[1:]}.",
        epilog=f"example:\n  max-ray {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _serve(options: dict[str, Any]) -> None:
    config_file, print_only = options.pop("config"), options.pop("print_config")
    paths = options.pop("model_path", [])
    if len(paths) > 1:
        options["models"] = tuple({"model_path": path} for path in paths)
    elif paths:
        options["model_path"] = paths[0]
    config, origins = load_serve_config(options, config_file=config_file, arguments_are="command line")
    if print_only:
        for number, model in enumerate(config.model_configs, start=1):
            own = [name for name in model.model_fields_set if getattr(model, name) != getattr(config, name)]
            _print_config(model, origins | dict.fromkeys(own, f"block {number} of models"))
        return
    from deployments.builder import serve_main

    serve_main(config)


def _run(options: dict[str, Any]) -> None:
    system, prompt, config_file = options.pop("system"), options.pop("prompt"), options.pop("config")
    api_key = options.pop("api_key")
    config, _ = load_serve_config(options, config_file=config_file, arguments_are="command line")
    flags = serve_flags(options | ({"config": config_file} if config_file else {}))
    run_model(config, flags, system, prompt, api_key)


def _generate(options: dict[str, Any]) -> None:
    config_file, print_only = options.pop("config"), options.pop("print_config")
    given = {name: options.pop(name) for name in GENERATE_FLAGS}
    config, origins = load_config(
        PipelineConfig,
        options,
        config_file=config_file,
        defaults={"model_path": str(DEMO_MODEL)},
        arguments_are="command line",
    )
    if print_only:
        return _print_config(config, origins)
    if given["prompt"] is None:
        raise UsageError("max-ray generate needs --prompt TEXT.")
    if settings.variable(settings.LOG_LEVEL) is None:
        setup_logging("WARNING")  # the text is what was asked for; how the model starts is not
    run_generate(config, given)


def _encode(options: dict[str, Any]) -> None:
    given = {name: options.pop(name) for name in ENCODE_FLAGS}
    config, _ = load_config(PipelineConfig, options, config_file=options.pop("config"), arguments_are="command line")
    if settings.variable(settings.LOG_LEVEL) is None:
        setup_logging("WARNING")
    run_encode(config, given)


def _batch(options: dict[str, Any]) -> None:
    given = {name: options.pop(name) for name in BATCH_FLAGS}
    config, _ = load_config(PipelineConfig, options, config_file=options.pop("config"), arguments_are="command line")
    if settings.variable(settings.LOG_LEVEL) is None:
        setup_logging("WARNING")
    run_batch(config, given)


def _list(options: dict[str, Any]) -> None:
    from max_ray.pipelines import PIPELINE_REGISTRY
    from max_ray.planning.memory_plan import aligned

    PIPELINE_REGISTRY.register_custom(options.get("custom_architectures", ()))
    families: list[dict[str, Any]] = [
        {
            "name": record.name,
            "task": record.task.value,
            "default_encoding": record.default_encoding.value,
            "modalities": ["text", "image"] if getattr(record.tokenizer, "takes_images", False) else ["text"],
            "encodings": sorted(encoding.value for encoding in record.supported_encodings),
            "example_repo_ids": list(record.example_repo_ids),
        }
        for record in PIPELINE_REGISTRY.all_architectures()
    ]
    if options["json"]:
        return print(json.dumps({"architectures": families}, indent=2))
    lists = ("modalities", "encodings", "example_repo_ids")
    rows = [[f["name"], f["task"], *(", ".join(f[name]) for name in lists)] for f in families]
    print(aligned([["architecture", "task", "modalities", "encodings", "examples"], *rows]))


def _check(options: dict[str, Any]) -> None:
    from max_ray.conformance.command import run

    run(options)


def _version(options: dict[str, Any]) -> None:
    assert not options, options
    print(max_ray.__version__)


def _print_config(config: PipelineConfig, origins: Origins) -> None:
    """Every setting, its value and its origin; None becomes what the model and the hardware make of it."""
    from max_ray.pipelines import resolve_plan
    from max_ray.planning.memory_plan import aligned

    plan = resolve_plan(config)
    values: dict[str, Any] = {name: getattr(config, name) for name in type(config).model_fields} | plan.values
    resolved = {name: text for name, text in plan.origins.items() if name not in origins or text != "given"}
    where = {name: (origins | resolved).get(name, "follows from the others") for name in values}
    rows = [[name, _shown(values[name]), where[name]] for name in values]
    print(aligned([["setting", "value", "origin"], *rows]))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value) or "-"
    return "-" if value is None else str(getattr(value, "value", value))


if __name__ == "__main__":
    sys.exit(main())
