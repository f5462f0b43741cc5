"""The command line `max-ray`: serve, generate, batch, encode, plan, warm-cache, list, check, benchmark, keys, version.

It parses, builds the configuration, and calls.

Flags are made from the fields of PipelineConfig and ServeConfig, so names, defaults and help are written once, there.
Values stay text until the configuration reads them. A user's mistake is one sentence on stderr and exit code 2.
Heavy imports (torch, Ray) happen in the command that needs them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import max_ray
from max_ray import settings
from max_ray.benchmark import command as benchmark
from max_ray.cli.batch import FLAGS as BATCH_FLAGS
from max_ray.cli.batch import add_batch_flags, run_batch
from max_ray.cli.encode import FLAGS as ENCODE_FLAGS
from max_ray.cli.encode import add_encode_flags, run_encode
from max_ray.cli.keys import add_key_commands, run_keys
from max_ray.cli.model_commands import run_plan, run_warm_cache
from max_ray.config import Origins, PipelineConfig, ServeConfig, load_config
from max_ray.config.models import ALIASES
from max_ray.errors import ConfigError, MaxRayError, nearest
from max_ray.log import setup_logging
from max_ray.serve.serve_config import DEMO_MODEL, load_serve_config

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from max_ray.interfaces import TextGenerationRequest

_NOT_A_FLAG = ("api_keys", "models")
"""A secret does not belong on a command line, where `ps` shows it; blocks of settings belong into a file."""
_SAMPLING_FLAGS = {
    "max_new_tokens": "Most tokens to generate (default: up to the model's length).",
    "temperature": "0 is greedy (default: the model's generation_config.json).",
    "top_k": "Draw from the k most likely tokens.",
    "top_p": "Draw from the most likely tokens that have this probability together.",
    "min_p": "Leave out tokens less likely than this share of the most likely one.",
    "seed": "Makes the draws repeatable.",
}


class UsageError(ConfigError):
    """A command line that cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `max-ray`. Gives the exit code: 0, 2 after a user's mistake, 130 after Ctrl-C, 141 (as a shell
    calls SIGPIPE) when the output is not read any longer."""
    try:
        options = _parse(list(sys.argv[1:] if arguments is None else arguments))
        setup_logging(settings.log_level())
        run = {
            "serve": _serve,
            "generate": _generate,
            "encode": _encode,
            "batch": _batch,
            "plan": lambda given: run_plan(given, {"model_path": str(DEMO_MODEL)}),
            "warm-cache": run_warm_cache,
            "list": _list,
            "check": _check,
            "benchmark": benchmark.run,
            "keys": run_keys,
            "version": _version,
        }
        run[options.pop("command")](options)
        sys.stdout.flush()
    except MaxRayError as error:
        print(f"max-ray: error: {error}", file=sys.stderr)
        return 2
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
    commands: dict[str, argparse.ArgumentParser] = {
        "serve": subparsers.add_parser("serve", help="serve a model over HTTP", allow_abbrev=False),
        "generate": subparsers.add_parser("generate", help="continue a prompt in this process", allow_abbrev=False),
        "encode": subparsers.add_parser("encode", help="make vectors of texts in this process", allow_abbrev=False),
        "batch": subparsers.add_parser("batch", help="answer a file of requests in this process", allow_abbrev=False),
        "plan": subparsers.add_parser("plan", help="say what memory a model needs", allow_abbrev=False),
        "warm-cache": subparsers.add_parser("warm-cache", help="fetch a model and check it", allow_abbrev=False),
        "list": subparsers.add_parser("list", help="list the model families", allow_abbrev=False),
        "check": subparsers.add_parser("check", help="hold a model family against its reference", allow_abbrev=False),
        "benchmark": subparsers.add_parser("benchmark", help="measure a server, draw the results", allow_abbrev=False),
        "keys": subparsers.add_parser("keys", help="make API keys", allow_abbrev=False),
        "version": subparsers.add_parser("version", help="print the version", allow_abbrev=False),
    }
    for name, kind in benchmark.add_commands(commands["benchmark"]).items():
        commands[f"benchmark {name}"] = kind
    for name, kind in add_key_commands(commands["keys"]).items():
        commands[f"keys {name}"] = kind
    _add_settings(commands["serve"], ServeConfig)
    _take_several(commands["serve"], "model_path")
    _add_settings(commands["generate"], PipelineConfig)
    _add_generate_flags(commands["generate"])
    _add_settings(commands["encode"], PipelineConfig, print_config=False)
    add_encode_flags(commands["encode"])
    _add_settings(commands["batch"], PipelineConfig, print_config=False)
    add_batch_flags(commands["batch"])
    _add_settings(commands["plan"], PipelineConfig, print_config=False)
    commands["plan"].add_argument("--json", action="store_true", help="machine-readable")
    for name in ("model_path", "revision", "custom_architectures"):
        _add_setting(commands["warm-cache"], name, PipelineConfig.model_fields[name])
    commands["list"].add_argument("--json", action="store_true", help="machine-readable")
    family = "A folder with a list ARCHITECTURES, an installed module, or a name that max-ray list has."
    commands["check"].add_argument("family", help=family)
    commands["check"].add_argument("--model-path", required=True, metavar="PATH", help="A checkpoint of that family.")
    _add_setting(commands["list"], "custom_architectures", PipelineConfig.model_fields["custom_architectures"])
    return parser, commands


def _add_settings(parser: argparse.ArgumentParser, cls: type[PipelineConfig], print_config: bool = True) -> None:
    for name, field in cls.model_fields.items():
        if name not in _NOT_A_FLAG:
            _add_setting(parser, name, field)
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings (or MAX_RAY_CONFIG).")
    if not print_config:
        return
    parser.add_argument(
        "--print-config", action="store_true", help="Print every setting and where it came from, and stop."
    )


def _add_setting(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    flags = [_flag(name), *(_flag(alias) for alias, target in ALIASES.items() if target == name)]
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(field)}
    if field.annotation is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif field.annotation == tuple[str, ...]:
        options |= {"action": "append", "metavar": "CODE"}
    else:
        options["metavar"] = name.rpartition("_")[2].upper()
    parser.add_argument(*flags, **options)


def _take_several(parser: argparse.ArgumentParser, name: str) -> None:
    """Lets a flag be given several times."""
    old = next(action for action in parser._actions if action.dest == name)
    flags, text = old.option_strings, f"{old.help} May be given several times: several models."
    for flag in flags:
        del parser._option_string_actions[flag]
    parser._remove_action(old)
    parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, action="append", metavar=old.metavar, help=text)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.default_factory is None and not field.is_required() and field.default not in (None, "", ()):
        text += f" Default: {field.default}."
    return text.replace("%", "%%")


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", help="Text to continue.")
    parser.add_argument("--chat", action="store_true", help="Send the prompt as a user's chat message.")
    for name, text in _SAMPLING_FLAGS.items():
        kind = float if name in ("temperature", "top_p", "min_p") else int
        parser.add_argument(_flag(name), type=kind, default=None, metavar=kind.__name__.upper(), help=text)


def _serve(options: dict[str, Any]) -> None:
    config_file, print_only = options.pop("config"), options.pop("print_config")
    paths = options.pop("model_path", [])
    if len(paths) > 1:
        options["models"] = tuple({"model_path": path} for path in paths)
    elif paths:
        options["model_path"] = paths[0]
    config, origins = load_serve_config(options, config_file=config_file, arguments_are="command line")
    if print_only:
        for model in config.model_configs:
            _print_config(model, origins)
        return
    from deployments.builder import serve_main

    serve_main(config)


def _generate(options: dict[str, Any]) -> None:
    config_file, print_only = options.pop("config"), options.pop("print_config")
    prompt, chat = options.pop("prompt"), options.pop("chat")
    sampling = {name: options.pop(name) for name in _SAMPLING_FLAGS}
    config, origins = load_config(
        PipelineConfig,
        options,
        config_file=config_file,
        defaults={"model_path": str(DEMO_MODEL)},
        arguments_are="command line",
    )
    if print_only:
        return _print_config(config, origins)
    if prompt is None:
        raise UsageError("max-ray generate needs --prompt TEXT.")
    if settings.variable(settings.LOG_LEVEL) is None:
        setup_logging("WARNING")  # the text is what was asked for; how the model starts is not
    from max_ray.interfaces import RequestID, TextGenerationRequest

    text: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    request = TextGenerationRequest(RequestID(), config.served_model_name, sampling_params=sampling, **text)
    for piece in _generated_text(config, request):
        print(piece, end="", flush=True)
    print()


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


def _generated_text(config: PipelineConfig, request: TextGenerationRequest) -> Iterator[str]:
    """Runs one request in this process; text as it comes. Raises MaxRayError."""
    from max_ray.interfaces import PipelineTask, TextContext, TextGenerationInputs
    from max_ray.pipelines import PIPELINE_REGISTRY
    from max_ray.tokenization.token_bytes import token_text_of

    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(config, PipelineTask.TEXT_GENERATION)
    context = asyncio.run(tokenizer.new_context(request))
    detokenizer = token_text_of(tokenizer).detokenizer(context.tokens.prompt)
    try:
        while not context.is_done:
            inputs = TextGenerationInputs[TextContext](batches=[{context.request_id: context}], num_steps=1)
            yield detokenizer.push(pipeline.execute(inputs)[context.request_id].tokens)
    finally:
        pipeline.release(context.request_id)
    yield detokenizer.flush()


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
