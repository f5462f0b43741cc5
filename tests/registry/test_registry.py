"""PIPELINE_REGISTRY: finding, registering, installed families, errors; no model is built here."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from max_ray import registry as registry_module
from max_ray.architecture import list_of_records
from max_ray.errors import ArchitectureNotFoundError, ConfigError
from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import KVCacheStrategy, PipelineTask, SupportedEncoding, TextContext
from max_ray.modeling import PipelineModel
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig, PipelineRegistry, SupportedArchitecture

TEXT, EMBEDDINGS = PipelineTask.TEXT_GENERATION, PipelineTask.EMBEDDINGS_GENERATION


def record(name: str = "TinyForCausalLM", **fields: Any) -> SupportedArchitecture:
    values: dict[str, Any] = {
        "name": name,
        "task": TEXT,
        "default_encoding": SupportedEncoding.float32,
        "supported_encodings": {SupportedEncoding.float32: [KVCacheStrategy.PAGED]},
        "pipeline_model": PipelineModel,
        "tokenizer": object,
    }
    return SupportedArchitecture(**{**values, **fields})


def entry_points(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, str]) -> None:
    """Pretends that these families are installed."""
    group = registry_module.ENTRY_POINT_GROUP
    found = [EntryPoint(name=name, value=value, group=group) for name, value in pairs]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: found)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    PIPELINE_REGISTRY.reset()


# -- the record --------------------------------------------------------------------------------------------------


def test_encodings_as_a_set_too() -> None:
    assert record(supported_encodings={SupportedEncoding.float32}).supported_encodings == {
        SupportedEncoding.float32: [KVCacheStrategy.PAGED]
    }


def test_default_encoding_must_be_supported() -> None:
    with pytest.raises(ConfigError, match="default_encoding=q4_k is not in supported_encodings"):
        record(default_encoding=SupportedEncoding.q4_k)


def test_required_arguments_must_be_settings() -> None:
    with pytest.raises(ConfigError, match="enable_prefix_cache"):
        record(required_arguments={"enable_prefix_cache": False})


def test_defaults_and_identity() -> None:
    one, two = record(), record()
    assert one.context_type is TextContext
    assert one.tokenizer_cls is one.tokenizer
    assert one != two
    assert len({one, two}) == 2
    with pytest.raises(AttributeError):
        one.name = "x"  # type: ignore[misc]


# -- registering and finding -------------------------------------------------------------------------------------


def test_retrieve_by_name_and_by_config(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch)
    tiny = record()
    found = PipelineRegistry([tiny])
    assert found.retrieve_architecture("TinyForCausalLM") is tiny
    config = HuggingFaceConfig({"architectures": ["Unknown", "TinyForCausalLM"]})
    assert found.retrieve_architecture(config) is tiny


def test_the_same_name_for_two_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch)
    text, embeddings = record(), record(task=EMBEDDINGS)
    found = PipelineRegistry([text, embeddings])
    assert found.retrieve_architecture("TinyForCausalLM", EMBEDDINGS) is embeddings
    assert found.retrieve_architecture("TinyForCausalLM") is text
    assert found.all_architectures() == [embeddings, text]


def test_a_taken_name_needs_allow_override(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch)
    one, two = record(), record()
    found = PipelineRegistry([one])
    found.register(one)
    with pytest.raises(ConfigError, match="allow_override=True"):
        found.register(two)
    found.register(two, allow_override=True)
    assert found.retrieve_architecture(one.name) is two


def test_only_records_can_be_registered() -> None:
    with pytest.raises(ConfigError, match="SupportedArchitecture"):
        PipelineRegistry().register("LlamaForCausalLM")  # type: ignore[arg-type]


def test_unknown_name_lists_what_there_is_nearest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch)
    found = PipelineRegistry([record("BertModel"), record("LlamaForCausalLM"), record("QwenForCausalLM")])
    with pytest.raises(ArchitectureNotFoundError) as caught:
        found.retrieve_architecture("LamaForCausalLM")
    message = str(caught.value)
    assert "No architecture LamaForCausalLM is known. Did you mean 'LlamaForCausalLM'?" in message
    assert "Known are: LlamaForCausalLM, QwenForCausalLM, BertModel." in message


def test_wrong_task_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch)
    with pytest.raises(ArchitectureNotFoundError, match="known for text_generation, but not for embeddings"):
        PipelineRegistry([record()]).retrieve_architecture("TinyForCausalLM", EMBEDDINGS)


def test_config_without_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch)
    found = PipelineRegistry([record()])
    with pytest.raises(ArchitectureNotFoundError, match=r"names no 'architectures'\. Known are: Tiny"):
        found.retrieve_architecture(HuggingFaceConfig({}))
    with pytest.raises(ConfigError, match="must be a list of class names"):
        found.retrieve_architecture(HuggingFaceConfig({"architectures": "TinyForCausalLM"}))


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch)
    with pytest.raises(ArchitectureNotFoundError, match="pip install"):
        PipelineRegistry().retrieve_architecture("LlamaForCausalLM")


# -- installed families ------------------------------------------------------------------------------------------


def test_llama_is_installed_and_imported_when_wanted() -> None:
    code = (
        "import sys\n"
        "from max_ray.pipelines import PIPELINE_REGISTRY as R\n"
        "assert 'LlamaForCausalLM' in R.architecture_names()\n"
        "assert 'architectures' not in sys.modules\n"
        "assert R.retrieve_architecture('LlamaForCausalLM').name == 'LlamaForCausalLM'\n"
        "assert 'architectures.llama3' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_wanted_family_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_family.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry_points(monkeypatch, ("LlamaForCausalLM", "architectures.llama3"), ("Broken", "broken_family"))
    found = PipelineRegistry()
    assert found.retrieve_architecture("LlamaForCausalLM").name == "LlamaForCausalLM"
    with pytest.raises(ConfigError, match=r"Broken.*broken_family.*no_such_module_anywhere"):
        found.retrieve_architecture("Broken")


def test_a_registered_record_beats_an_installed_one() -> None:
    own = record("LlamaForCausalLM")
    with pytest.raises(ConfigError, match="allow_override"):
        PipelineRegistry().register(own)
    found = PipelineRegistry()
    found.register(own, allow_override=True)
    assert found.retrieve_architecture("LlamaForCausalLM") is own
    named = [record for record in found.all_architectures() if record.name == "LlamaForCausalLM"]
    assert named == [own]
    found.reset()
    assert found.retrieve_architecture("LlamaForCausalLM") is not own


def test_two_packages_with_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, ("A", "one"), ("A", "two"))
    with pytest.raises(ConfigError, match="Two installed packages bring the architecture A: one and two"):
        PipelineRegistry().retrieve_architecture("A")
    entry_points(monkeypatch, ("A", "one"), ("A", "one"))
    assert PipelineRegistry().architecture_names() == ["A"]


class _Module:
    def __init__(self, **names: Any) -> None:
        self.__dict__.update(names)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_Module(), "X has no list ARCHITECTURES"),
        (_Module(ARCHITECTURES=3), "must be a list"),
        (_Module(ARCHITECTURES=["LlamaForCausalLM"]), "must be a list"),
        (_Module(ARCHITECTURES=[]), "is empty"),
        (_Module(ARCHITECTURES=record("One")), r"not the record One itself\.$"),
        (_Module(ARCHITECTURES=[record("One"), 1]), r"not \[the record One itself, 1\]\.$"),
    ],
)
def test_lists_of_records(module: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list_of_records(module, "X")


# -- who builds --------------------------------------------------------------------------------------------------


class _Pipeline:
    """A pipeline that remembers what it was built from."""

    def __init__(self, *built_from: Any) -> None:
        self.built_from = built_from


class _Factory:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __call__(self) -> Any:
        return _Pipeline(*self.arguments)


def test_the_builder_gets_what_was_asked_for() -> None:
    found = PipelineRegistry()
    found.set_builder(lambda config, task, override: ("tokenizer", _Factory(config, task, override)))
    config = PipelineConfig(model_path="m")
    tokenizer, pipeline = found.retrieve(config, EMBEDDINGS, "Other")
    assert tokenizer == "tokenizer"
    assert pipeline.built_from == (config, EMBEDDINGS, "Other")  # type: ignore[attr-defined]
    assert found.retrieve_tokenizer(config) == "tokenizer"
    _, factory = found.retrieve_factory(config)
    assert pickle.loads(pickle.dumps(factory))().built_from == (config, None, None)


def test_context_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnContext(TextContext):
        pass

    entry_points(monkeypatch)
    (tmp_path / "config.json").write_text('{"architectures": ["TinyForCausalLM"]}')
    found = PipelineRegistry([record(context_type=OwnContext)])
    assert found.retrieve_context_type(PipelineConfig(model_path=str(tmp_path))) is OwnContext
