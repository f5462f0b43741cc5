"""`max-ray plan`, `pull` and `warm-cache`: what a model needs, and fetching it ahead of time. None reads weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from max_ray.config import PipelineConfig, load_config
from max_ray.errors import ModelPathError
from max_ray.planning.hardware import GIB


def run_plan(options: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Prints the memory plan of a start. Raises DoesNotFitError with the same table and settings that fit."""
    from max_ray.pipelines import resolve_plan

    as_json, config_file = options.pop("json"), options.pop("config")
    config, _ = load_config(
        PipelineConfig, options, config_file=config_file, defaults=defaults, arguments_are="command line"
    )
    plan = resolve_plan(config)
    if as_json:
        return print(json.dumps({"model": plan.model_dir} | plan.values | {"memory": plan.memory.to_json()}, indent=2))
    print(f"{plan.architecture} in {plan.encoding.value}, from {plan.model_dir}")
    print(plan.memory.text())


def add_pull_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `max-ray pull`."""
    parser.add_argument("model", metavar="MODEL", help="owner/name, or owner/name:Q4_K_M for one GGUF model of it.")
    parser.add_argument("--revision", metavar="REVISION", help="Branch, tag or commit. Default: main.")


def run_pull(options: dict[str, Any]) -> None:
    """Downloads a model into the hub's cache, with the hub's progress bars on stderr; prints where it is.

    Raises ModelPathError for a repository that cannot be had.
    """
    from max_ray.hub import is_repository, pulled

    if not is_repository(options["model"]):
        raise ModelPathError(f"{options['model']} is no repository of the hub: give owner/name or owner/name:Q4_K_M.")
    path = pulled(options["model"], options["revision"])
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    print(f"{options['model']}: {sum(file.stat().st_size for file in files) / GIB:.2f} GiB, in {path}")


def run_warm_cache(options: dict[str, Any]) -> None:
    """Fetches a model into the hub's cache, and checks what a start would check first: configuration, headers of the
    weights, tokenizer. Raises ConfigError and WeightsError."""
    from max_ray.huggingface import resolve_model_path
    from max_ray.planning.encoding import choose_encoding
    from max_ray.planning.plan import weights_format_of
    from max_ray.planning.served_config import served_config
    from max_ray.planning.tasks import task_of
    from max_ray.planning.weight_sizes import checked_checkpoint
    from max_ray.registry import PIPELINE_REGISTRY
    from max_ray.tokenization.tokenizer import TextTokenizer

    config = PipelineConfig(**options)
    path = resolve_model_path(config.model_path, config.revision)
    hf_config = served_config(config, path)
    task = task_of(config)
    record = PIPELINE_REGISTRY.retrieve_architecture(hf_config, task, config.custom_architectures)
    record.pipeline_model.check_tensor_parallel(hf_config, 1)  # what is in config.json, as the family reads it
    encoding = choose_encoding(config, record, hf_config, {})
    source, _ = checked_checkpoint(path, weights_format_of(path, record), record, hf_config, encoding)
    if issubclass(record.tokenizer, TextTokenizer):
        record.tokenizer(path, max_length=1 << 20)
    size = source.nbytes() / GIB
    print(f"{config.served_model_name}: {record.name}, {len(source.names())} tensors, {size:.2f} GiB, in {path}")
