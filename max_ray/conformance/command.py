"""`max-ray check FAMILY --model-path DIR`: the suite on a family of one's own, with a readable verdict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from max_ray.architecture import SupportedArchitecture
from max_ray.conformance.reference import Reference, huggingface_reference
from max_ray.conformance.suite import Suite, Verdict
from max_ray.errors import ConfigError, ConformanceError, ParallelismError
from max_ray.huggingface import HuggingFaceConfig, load_huggingface_config, resolve_model_path
from max_ray.interfaces import PipelineTask, SupportedEncoding
from max_ray.registry import PIPELINE_REGISTRY
from max_ray.weights import open_weights
from max_ray.weights.mapping import NameMap

REFERENCE = "reference_logits"
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_HEAD = ("ranks", "encoding", "case", "error", "limit", "greedy", "verdict")


def run(options: dict[str, Any]) -> None:
    """Prints a line for each case. Raises ConformanceError where one is outside of its limit, WeightsError for tensors
    that are missing or left over, ConfigError where there is nothing to compare."""
    torch.set_num_threads(1)
    path = resolve_model_path(options["model_path"])
    config = load_huggingface_config(path)
    record = _record(options["family"], config)
    if record.task is not PipelineTask.TEXT_GENERATION:
        raise ConfigError(f"{record.name} is for {record.task.value}: max-ray check compares models that write text.")
    suite = Suite(record, path, _reference(record, path), is_routed(config))
    print(f"{record.name}: {options['family']} on {path}")
    print(_weights_line(record, config, path))
    print(_line(_HEAD))
    wrong = total = 0
    for num_ranks in (1, 2):
        refusal = _refusal(record, config, num_ranks)
        if refusal:
            print(f"{num_ranks} ranks: not run. {refusal}")
            continue
        for encoding in (SupportedEncoding.float32, SupportedEncoding.bfloat16):
            if encoding not in record.supported_encodings:
                print(f"{encoding.value}: not run, the record does not list it.")
                continue
            verdicts = suite.run(num_ranks, encoding)
            print(*map(_row, verdicts), sep="\n", flush=True)
            wrong += sum(not verdict.passed for verdict in verdicts)
            total += len(verdicts)
    if wrong or not total:
        raise ConformanceError(f"{record.name} does not conform: {wrong} of {total} cases are outside of their limits.")
    print(f"{record.name} conforms: all {total} cases are within their limits.")


def is_routed(config: HuggingFaceConfig) -> bool:
    """Whether config.json is that of a mixture of experts."""
    return any(config.get(name) for name in _EXPERTS)


def _record(spec: str, config: HuggingFaceConfig) -> SupportedArchitecture:
    records = PIPELINE_REGISTRY.register_custom([spec])
    for record in records:
        if record.name in config.architecture_names:
            return record
    raise ConfigError(
        f"{spec} brings {', '.join(record.name for record in records)}, but config.json says "
        f"{', '.join(config.architecture_names) or 'nothing'} in 'architectures': give a checkpoint of that family."
    )


def _reference(record: SupportedArchitecture, path: Path) -> Reference:
    """`reference_logits(path, sequences)` of the family's package where it has one, else Hugging Face."""
    package = sys.modules[record.pipeline_model.__module__.partition(".")[0]]
    own = getattr(package, REFERENCE, None)
    if own is not None:
        return lambda sequences: [torch.as_tensor(logits).float() for logits in own(path, sequences)]
    return huggingface_reference(path)


def _weights_line(record: SupportedArchitecture, config: HuggingFaceConfig, path: Path) -> str:
    """How many tensors the checkpoint has, and which the family's table drops. (Missing and left-over tensors, and
    those of a wrong shape, are errors of loading.)"""
    names = open_weights(path).names()
    adapter = record.weight_adapters.get(record.default_weights_format)
    table = adapter(config) if adapter is not None else None
    if not isinstance(table, NameMap):
        return f"{len(names)} tensors."
    dropped = table.rename(names).dropped
    return (
        f"{len(names)} tensors, of which the table drops {len(dropped)}{': ' if dropped else '.'}{', '.join(dropped)}"
    )


def _refusal(record: SupportedArchitecture, config: HuggingFaceConfig, num_ranks: int) -> str:
    """Why the family does not run on so many ranks; empty where it does."""
    if num_ranks > 1 and not record.multi_gpu_supported:
        return "The record says multi_gpu_supported=False."
    try:
        record.pipeline_model.check_tensor_parallel(config, num_ranks)
    except ParallelismError as error:
        return str(error)
    return ""


def _row(verdict: Verdict) -> str:
    greedy = {None: "", True: "equal", False: "differs"}[verdict.greedy_equal]
    fields = (str(verdict.num_ranks), verdict.encoding.value, verdict.case, f"{verdict.error:.1e}")
    return _line((*fields, f"{verdict.limit:.0e}", greedy, "ok" if verdict.passed else "WRONG"))


def _line(fields: tuple[str, ...]) -> str:
    return "  ".join(field.ljust(10) for field in fields).rstrip()
