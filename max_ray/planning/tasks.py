"""Which task a model is run for, and what goes with it. No torch."""

from __future__ import annotations

from pathlib import Path

from max_ray.config import PipelineConfig
from max_ray.errors import ConfigError
from max_ray.huggingface import HuggingFaceConfig, load_huggingface_config, resolve_model_path
from max_ray.interfaces import PipelineTask
from max_ray.registry import PIPELINE_REGISTRY, SupportedArchitecture
from max_ray.sentence_files import SentenceFiles, has_sentence_files

_EMBEDDINGS, _TEXT = PipelineTask.EMBEDDINGS_GENERATION, PipelineTask.TEXT_GENERATION


def task_of(config: PipelineConfig) -> PipelineTask:
    """The task that `config` is served for; reads config.json. Raises ConfigError where there is no such model."""
    model_dir = resolve_model_path(config.model_path, config.revision)
    served = PIPELINE_REGISTRY.served_config(load_huggingface_config(model_dir), config.custom_architectures)
    return choose_task(config, None, served, model_dir, {})


def choose_task(
    config: PipelineConfig,
    wanted: PipelineTask | None,
    name: str | HuggingFaceConfig,
    model_dir: Path,
    origins: dict[str, str],
) -> PipelineTask:
    """`wanted`, the configuration's, or what the model is made for.

    That is embeddings or scores where its family does nothing else; embeddings where the folder has the files of a
    sentence-transformers model and its family does both, or config.json names the network without a head. Raises
    ConfigError where the first two differ.
    """
    if wanted is not None and config.task not in (None, wanted):
        raise ConfigError(
            f"The setting task is {config.task.value if config.task else None}, and this use of the model is for "
            f"{wanted.value}. Leave the setting out."
        )
    given = wanted or config.task
    if given is not None:
        origins["task"] = "given"
        return given
    tasks = PIPELINE_REGISTRY.tasks_of(name, config.custom_architectures)
    origins["task"] = "model: config.json"
    if _EMBEDDINGS in tasks and _TEXT in tasks:
        origins["task"] = "model: modules.json" if has_sentence_files(model_dir) else "default of the architecture"
        return _EMBEDDINGS if has_sentence_files(model_dir) else _TEXT
    if tasks and _is_without_head(name) and has_sentence_files(model_dir):
        origins["task"] = "model: modules.json"
        return _EMBEDDINGS
    if tasks == {PipelineTask.SCORE}:
        return PipelineTask.SCORE
    return _EMBEDDINGS if _EMBEDDINGS in tasks else _TEXT


def _is_without_head(name: str | HuggingFaceConfig) -> bool:
    """Whether config.json names classes, and none that a family has: those of base classes."""
    names = [] if isinstance(name, str) else name.architecture_names
    return bool(names) and not any(PIPELINE_REGISTRY.records_of(each) for each in names)


def sentence_files(architecture: SupportedArchitecture, model_dir: Path) -> SentenceFiles | None:
    """How vectors are made, for the embeddings task; None for another. Raises ConfigError for files that ask for what
    is not supported."""
    if architecture.task is not _EMBEDDINGS:
        return None
    return SentenceFiles.read(model_dir, architecture.pipeline_model.default_pooling())
