"""`max-ray check FAMILY --model-path DIR`: the suite on a family, with a readable verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from max_ray.architecture import SupportedArchitecture
from max_ray.conformance.reference import Reference, huggingface_reference
from max_ray.conformance.suite import Suite, Verdict
from max_ray.custom_code import import_spec
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
    family = options["family"]
    record = _record(family, config)
    weights_line = _weights_line(record, config, path)  # first: a damaged file is said in our words
    suite = Suite(record, path, _reference(family, path), is_routed(config))
    print(f"{record.name}: {family} on {path}")
    print(weights_line)
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


def _record(family: str, config: HuggingFaceConfig) -> SupportedArchitecture:
    """The record of a family, given as the name of a known one (`max-ray list`) or as a spec of custom code."""
    known = _is_known(family)
    found = PIPELINE_REGISTRY.records_of(family) if known else PIPELINE_REGISTRY.register_custom([family])
    writing = [record for record in found if record.task is PipelineTask.TEXT_GENERATION]
    if not writing:
        raise ConfigError(f"{family} is for {found[0].task.value}: max-ray check compares models that write text.")
    for record in writing:
        if record.name in config.architecture_names or record.pipeline_model.covers(config):
            return record
    asked = f"The family is {family}" if known else f"{family} brings {', '.join(record.name for record in writing)}"
    raise ConfigError(
        f"{asked}, but config.json says {', '.join(config.architecture_names) or 'nothing'} in 'architectures': give a "
        f"checkpoint of that family."
    )


def _is_known(family: str) -> bool:
    return family in PIPELINE_REGISTRY.architecture_names()


def _reference(family: str, path: Path) -> Reference:
    """`reference_logits(path, sequences)` beside the family's list where it is there, else Hugging Face."""
    own = None if _is_known(family) else getattr(import_spec(family), REFERENCE, None)
    if own is None:
        return huggingface_reference(path)

    def logits_of(sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        logits = [torch.as_tensor(each).float() for each in own(path, sequences)]
        if [each.shape[:-1] for each in logits] != [(len(sequence),) for sequence in sequences]:
            raise ConfigError(
                f"{REFERENCE} of {family} must give logits [length, vocabulary] for each of {len(sequences)} "
                f"sequences, not {[tuple(each.shape) for each in logits]}."
            )
        return logits

    return logits_of


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
