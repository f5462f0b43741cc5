"""PIPELINE_REGISTRY: which family, which record, which builder. It finds; it never builds a model itself.

Records come from three places, later ones override earlier ones of the same (name, task):
  1. installed packages, through the entry point group `max_ray.architectures` (the name is the class name in
     config.json, the value a module with an ARCHITECTURES list); imported only when that name is wanted;
  2. `register(record)`;
  3. custom architectures named in the configuration.

Where none of these has the name in config.json, the record FALLBACK serves, if it is there and covers the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol

from max_ray.architecture import SupportedArchitecture, list_of_records
from max_ray.config import PipelineConfig
from max_ray.custom_code import PackedCode, import_architectures, install_packed
from max_ray.errors import ArchitectureNotFoundError, ConfigError, nearest
from max_ray.huggingface import HuggingFaceConfig, load_huggingface_config, resolve_model_path
from max_ray.interfaces import PipelineTask
from max_ray.log import get_logger

if TYPE_CHECKING:
    from max_ray.interfaces import Pipeline, PipelinesFactory

__all__ = ["PIPELINE_REGISTRY", "PipelineRegistry", "SupportedArchitecture"]

ENTRY_POINT_GROUP = "max_ray.architectures"
FALLBACK = "TransformersForCausalLM"
"""Name of the record that runs what transformers implements and no family here does."""

_LOG = get_logger(__name__)


class Builder(Protocol):
    """Turns a configuration into a tokenizer and a picklable factory of the pipeline. Raises ConfigError."""

    def __call__(
        self, config: PipelineConfig, task: PipelineTask | None, override_architecture: str | None
    ) -> tuple[Any, PipelinesFactory]: ...


class PipelineRegistry:
    """Records of model families by (name, task). `PIPELINE_REGISTRY` is the one that is used."""

    def __init__(self, architectures: Iterable[SupportedArchitecture] = ()) -> None:
        self._records: dict[tuple[str, PipelineTask], SupportedArchitecture] = {}
        self._imported: set[str] = set()
        self._builder: Builder | None = None
        for architecture in architectures:
            self.register(architecture)

    def set_builder(self, builder: Builder) -> None:
        """Says who builds; `max_ray.pipelines.builder` does this once, so that the registry imports no builder."""
        self._builder = builder

    def register(self, architecture: SupportedArchitecture, *, allow_override: bool = False) -> None:
        """Adds a record. Raises ConfigError when its (name, task) is taken, unless `allow_override`."""
        if not isinstance(architecture, SupportedArchitecture):
            raise ConfigError(f"Only SupportedArchitecture records can be registered, not {architecture!r}.")
        key = (architecture.name, architecture.task)
        if not allow_override:
            self._import_installed(architecture.name)
            if self._records.get(key, architecture) is not architecture:
                raise ConfigError(
                    f"An architecture {key[0]} for {key[1].value} is registered already: pass allow_override=True "
                    f"to replace it."
                )
        self._records[key] = architecture

    def retrieve_architecture(
        self,
        name: str | HuggingFaceConfig,
        task: PipelineTask = PipelineTask.TEXT_GENERATION,
        custom_architectures: Sequence[str] = (),
    ) -> SupportedArchitecture:
        """The record for a class name, or for the first known one of config.json's `architectures`, or for the first
        known one that they mean (see PipelineModel.class_names), or the fallback for a config.json that it covers. The
        last two are said in the log.

        custom_architectures: folders or modules whose records are registered first, in place of built-in ones.
        Raises ArchitectureNotFoundError that lists what there is, nearest first; ConfigError for custom code that
        cannot be imported.
        """
        self.register_custom(custom_architectures)
        names = [name] if isinstance(name, str) else name.architecture_names
        for candidate in names:
            record = self._find(candidate, task)
            if record is not None:
                return record
        config = None if isinstance(name, str) else name
        for meant in self._meant_by(config):
            record = self._find(meant, task)
            if record is not None:
                _LOG.info("%s", _said(names, meant, config))
                return record
        if config is not None and (fallback := self._fallback(config, task)) is not None:
            _LOG.info(
                "%s: no family of ours; transformers' own code runs it, with our attention and KV cache (%s)",
                " / ".join(names),
                FALLBACK,
            )
            return fallback
        raise ArchitectureNotFoundError(self._not_found(names, task, config))

    def served_config(self, config: HuggingFaceConfig, custom_architectures: Sequence[str] = ()) -> HuggingFaceConfig:
        """config.json itself, or that of its text network (with `text_part_of`) for a multimodal model that no family
        has as a whole. Raises ConfigError for values that such a network cannot have."""
        self.register_custom(custom_architectures)
        if any(self.records_of(name) for name in config.architecture_names):
            return config
        record = self._find(FALLBACK, PipelineTask.TEXT_GENERATION)
        text = None if record is None else record.pipeline_model.text_network(config)
        return config if text is None else HuggingFaceConfig(text, "config.json: text_config")

    def tasks_of(
        self, name: str | HuggingFaceConfig, custom_architectures: Sequence[str] = ()
    ) -> frozenset[PipelineTask]:
        """The tasks that a class name, or the first known one of config.json's, has records for; none where none is
        known."""
        self.register_custom(custom_architectures)
        config = None if isinstance(name, str) else name
        for candidate in [name] if isinstance(name, str) else [*name.architecture_names, *self._meant_by(config)]:
            tasks = frozenset(record.task for record in self.records_of(candidate))
            if tasks:
                return tasks
        return frozenset()

    def register_custom(self, specs: Sequence[str]) -> list[SupportedArchitecture]:
        """Imports custom architectures (`--custom-architectures`) and registers their records in place of any others
        of the same name and task. Raises ConfigError that says what is wrong with the code, or which two bring the
        same."""
        brought: dict[tuple[str, PipelineTask], tuple[str, SupportedArchitecture]] = {}
        for spec in specs:
            for record in import_architectures(spec):
                other, first = brought.setdefault((record.name, record.task), (spec, record))
                if first is not record:
                    raise ConfigError(
                        f"The custom architectures {other} and {spec} both bring {record.name}: drop one."
                    )
        records = [record for _, record in brought.values()]
        for record in records:
            self.register(record, allow_override=True)
        return records

    def register_packed(self, packed: Sequence[PackedCode]) -> list[SupportedArchitecture]:
        """Installs code that came from another process and registers its records, in place of any others of the same
        name and task. Raises ConfigError."""
        records = install_packed(packed)
        for record in records:
            self.register(record, allow_override=True)
        return records

    def retrieve_factory(
        self,
        config: PipelineConfig,
        task: PipelineTask | None = None,
        override_architecture: str | None = None,
    ) -> tuple[Any, PipelinesFactory]:
        """The tokenizer, and a picklable callable that loads the weights and gives the pipeline.

        task: by default the configuration's, else what the model is made for. override_architecture: the name to use
        instead of config.json's. Raises ConfigError for anything that can be known to fail before weights are read.
        """
        assert self._builder is not None, "take PIPELINE_REGISTRY from max_ray.pipelines, which gives it a builder"
        return self._builder(config, task, override_architecture)

    def retrieve(
        self,
        config: PipelineConfig,
        task: PipelineTask | None = None,
        override_architecture: str | None = None,
    ) -> tuple[Any, Pipeline[Any, Any]]:
        """The tokenizer and the loaded pipeline, in this process."""
        tokenizer, factory = self.retrieve_factory(config, task, override_architecture)
        return tokenizer, factory()

    def retrieve_tokenizer(self, config: PipelineConfig, task: PipelineTask | None = None) -> Any:
        """The tokenizer alone; no weights are read."""
        return self.retrieve_factory(config, task)[0]

    def retrieve_context_type(
        self, config: PipelineConfig, task: PipelineTask = PipelineTask.TEXT_GENERATION
    ) -> type[Any]:
        """The class of the contexts that this configuration's tokenizer makes."""
        model_config = load_huggingface_config(resolve_model_path(config.model_path, config.revision))
        served = self.served_config(model_config, config.custom_architectures)
        return self.retrieve_architecture(served, task, config.custom_architectures).context_type

    def records_of(self, name: str) -> list[SupportedArchitecture]:
        """The records of a class name, one a task; none where it is not known."""
        found = (self._find(name, task) for task in PipelineTask)
        return [record for record in found if record is not None]

    def architecture_names(self) -> list[str]:
        """Names of all known families, installed ones included; imports nothing."""
        return sorted({name for name, _ in self._records} | set(_installed()))

    def all_architectures(self) -> list[SupportedArchitecture]:
        """All records; imports every installed family."""
        for name in _installed():
            self._import_installed(name)
        return [self._records[key] for key in sorted(self._records, key=lambda key: (key[0], key[1].value))]

    def reset(self) -> None:
        """Forgets every record; installed families are found again when wanted."""
        self._records.clear()
        self._imported.clear()

    def _find(self, name: str, task: PipelineTask) -> SupportedArchitecture | None:
        if (name, task) not in self._records:
            self._import_installed(name)
        return self._records.get((name, task))

    def _meant_by(self, config: HuggingFaceConfig | None) -> Sequence[str]:
        """Class names that a config.json means whose own names are not known; none for one that the fallback's code
        has under its own name."""
        if config is None or any(self.records_of(name) for name in config.architecture_names):
            return ()
        record = self._find(FALLBACK, PipelineTask.TEXT_GENERATION)
        return () if record is None else record.pipeline_model.class_names(config)

    def _fallback(self, config: HuggingFaceConfig, task: PipelineTask) -> SupportedArchitecture | None:
        """The record FALLBACK where it covers the model."""
        record = self._find(FALLBACK, task)
        return record if record is not None and record.pipeline_model.covers(config) else None

    def _import_installed(self, name: str) -> None:
        """Imports the installed family `name`, once; its records never replace registered ones."""
        entry_point = _installed().get(name)
        if entry_point is None or name in self._imported:
            return
        for record in _records_of(entry_point):
            self._records.setdefault((record.name, record.task), record)
        self._imported.add(name)

    def _not_found(self, names: list[str], task: PipelineTask, config: HuggingFaceConfig | None) -> str:
        known, meant = self.architecture_names(), self._meant_by(config)
        other_tasks = {t.value for n, t in self._records if n in (*names, *meant)}
        if config is not None:
            other_tasks |= {t.value for t in PipelineTask if self._fallback(config, t) is not None}
        if other_tasks:
            return (
                f"{' / '.join(names or meant)} is known for {', '.join(sorted(other_tasks))}, but not for {task.value}."
            )
        if not names and not meant:
            return f"config.json names no 'architectures'. Known are: {', '.join(known)}."
        if not known:
            return f"No architecture is known, so not {names[0]} either: install max_ray (pip install -e .)."
        if config is not None and meant:
            return f"{_said(names, meant[0], config)}. No family here runs it. Known are: {', '.join(known)}."
        first = sorted(known, key=lambda name: _distance(names[0], name))
        hint = nearest(names[0], [name for name in known if _digits(name) == _digits(names[0])])
        if config is not None and config.get("auto_map") is not None:
            hint = " Code that comes with the checkpoint (auto_map in config.json) is not run."
        return (
            f"No architecture {' / '.join(names)} is known.{hint} Known are: {', '.join(first)}. "
            f"Another one can be added with --custom-architectures."
        )


def _said(names: Sequence[str], meant: str, config: HuggingFaceConfig | None) -> str:
    """One line for a config.json that means another class than it names."""
    model_type = "" if config is None else config.get("model_type")
    named = f"config.json names {' / '.join(names)}" if names else "config.json names no architectures"
    own_code = ""
    if config is not None and config.get("auto_map") is not None:
        own_code = "; code that comes with the checkpoint (auto_map) is not run"
    return f"{named}, which for model_type {model_type!r} is {meant} of transformers{own_code}"


def _distance(wanted: str, name: str) -> tuple[float, str]:
    return (-SequenceMatcher(None, wanted.lower(), name.lower()).ratio(), name)


def _digits(name: str) -> str:
    """Of another generation of models is not a misspelling: Qwen2 is not Qwen3."""
    return "".join(filter(str.isdigit, name))


def _installed() -> dict[str, EntryPoint]:
    """Entry points by name, read once: it takes milliseconds, and a start asks a dozen times. Raises ConfigError when
    two packages bring the same name with different modules."""
    return _installed_by(entry_points)


@lru_cache(maxsize=1)
def _installed_by(find: Callable[..., Iterable[EntryPoint]]) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry_point in find(group=ENTRY_POINT_GROUP):
        other = found.setdefault(entry_point.name, entry_point)
        if other.value != entry_point.value:
            raise ConfigError(
                f"Two installed packages bring the architecture {entry_point.name}: {other.value} and "
                f"{entry_point.value}. Uninstall one of them."
            )
    return found


def _records_of(entry_point: EntryPoint) -> list[SupportedArchitecture]:
    """ARCHITECTURES of an installed family. Raises ConfigError that names the entry point."""
    try:
        module = import_module(entry_point.module)
    except ImportError as error:
        raise ConfigError(
            f"The installed architecture {entry_point.name} ({entry_point.value}) cannot be imported: {error}."
        ) from error
    return list_of_records(module, f"The installed architecture {entry_point.name} ({entry_point.value})")


PIPELINE_REGISTRY = PipelineRegistry()
"""The registry of this process: the only module-level mutable object of the library."""
