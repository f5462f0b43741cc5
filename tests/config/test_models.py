"""PipelineConfig and ServeConfig: rules, sentences, derived values."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from max_ray.config import DeviceChoice, PipelineConfig, ServeConfig, SettingsError
from max_ray.config.models import is_loopback
from max_ray.config.ports import parse_port_range
from max_ray.errors import ConfigError
from max_ray.interfaces import SupportedEncoding
from tests.gguf_files import write


@pytest.fixture(autouse=True)
def _no_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_RAY_API_KEYS", raising=False)


def sentence(cls: type[PipelineConfig] = PipelineConfig, **values: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        cls(**values)
    assert "pydantic" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_setting_names_the_nearest() -> None:
    assert sentence(model_path="m", max_lenght=5) == "There is no setting 'max_lenght'. Did you mean 'max_length'?"


def test_missing_model_path() -> None:
    assert sentence().startswith("model_path is missing.")
    assert sentence(model_path="").startswith("model_path is missing.")


def test_each_problem_has_its_sentence() -> None:
    with pytest.raises(SettingsError) as caught:
        PipelineConfig(model_path="m", max_length=0, devices="tpu", qantization_encoding="bf16")
    assert [name for name, _ in caught.value.problems] == ["max_length", "devices", "qantization_encoding"]
    assert caught.value.problems[0][1] == "max_length should be greater than or equal to 1, not 0."
    assert caught.value.problems[1][1] == (
        "devices should be 'auto', 'cpu', 'gpu' or GPU numbers like 'gpu:0,1', not 'tpu'."
    )
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


@pytest.mark.parametrize(
    ("name", "beyond"),
    [
        ("max_length", 0),
        ("max_batch_size", 0),
        ("max_batch_input_tokens", 0),
        ("max_num_steps", 0),
        ("kv_cache_page_size", 0),
        ("kv_cache_memory", 0),
        ("device_memory_utilization", 0),
        ("device_memory_utilization", 1.01),
        ("tensor_parallel_size", 0),
        ("num_threads", 0),
        ("num_threads", 10**8),
        ("kv_cache_memory", float("inf")),
        ("kv_cache_memory", 1e300),
    ],
)
def test_borders_are_refused(name: str, beyond: float) -> None:
    assert name in sentence(model_path="m", **{name: beyond})


@pytest.mark.parametrize(
    "name", ["lease_grace_s", "worker_start_timeout_s", "collective_timeout_s", "target_ongoing_requests"]
)
@pytest.mark.parametrize("value", [0, "inf", "nan", "1e300"])
def test_times_and_loads_are_finite(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"{name} should be"):
        ServeConfig(**{name: value})


def test_text_values_are_understood() -> None:
    config = PipelineConfig(
        model_path="m",
        max_length="8",
        enable_prefix_caching="false",
        quantization_encoding="float32",
        max_batch_size="none",
        kv_cache_memory="0.5",
        custom_architectures="./a, ./b",
    )
    assert config.max_length == 8
    assert config.enable_prefix_caching is False
    assert config.quantization_encoding is SupportedEncoding.float32
    assert config.max_batch_size is None
    assert config.kv_cache_memory == 0.5
    assert config.custom_architectures == ("./a", "./b")


def test_none_as_text_is_a_word_where_none_is_not_allowed() -> None:
    assert PipelineConfig(model_path="none").model_path == "none"
    assert "max_num_steps" in sentence(model_path="m", max_num_steps="none")


def test_model_is_an_alias() -> None:
    assert PipelineConfig(model="m").model_path == "m"
    assert PipelineConfig(model="m", model_path="m").model_path == "m"
    assert sentence(model="m", model_path="n") == "model and model_path are the same setting: give one of them."


def test_frozen() -> None:
    config = PipelineConfig(model_path="m")
    with pytest.raises(ValidationError):
        config.max_length = 5  # type: ignore[misc]


def test_served_model_name_follows_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama").mkdir()
    assert PipelineConfig(model_path=str(tmp_path / "llama")).served_model_name == "llama"
    monkeypatch.chdir(tmp_path / "llama")
    assert PipelineConfig(model_path=".").served_model_name == "llama"
    assert PipelineConfig(model_path="owner/name").served_model_name == "owner/name"
    assert PipelineConfig(model_path="owner/name", served_model_name="x").served_model_name == "x"


def test_names_of_a_gguf_model(tmp_path: Path) -> None:
    def names(file: str, **metadata: str) -> tuple[str, tuple[str, ...]]:
        keys = {f"general__{key}": value for key, value in metadata.items()}
        config = PipelineConfig(model_path=str(write(tmp_path / file, {}, **keys)))
        return config.served_model_name, config.served_model_aliases

    smol = {"name": "Smollm2 135M 8k Lc100K Mix1 Ep2", "basename": "smollm2"}
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert names(file, **smol) == ("SmolLM2-135M-Instruct", (file,))
    assert names("SmolLM2-135M-Instruct-UD-Q4_K_XL.gguf", **smol)[0] == "SmolLM2-135M-Instruct"
    assert names("smollm2.F16.gguf", **smol)[0] == "smollm2"
    assert names("model.gguf", **smol) == ("Smollm2-135M-8k-Lc100K-Mix1-Ep2", ("model.gguf",))
    assert names("ggml-model-q4_0.gguf", name="Qwen3 0.6B")[0] == "Qwen3-0.6B"
    assert names("Qwen3-0.6B-IQ4_XS.gguf", name="Qwen3 0.6B Base")[0] == "Qwen3-0.6B"
    assert names("mine-Q8_0.gguf") == ("mine", ("mine-Q8_0.gguf",))
    (tmp_path / "torn-Q8_0.gguf").write_bytes(b"GGUF")
    assert PipelineConfig(model_path=str(tmp_path / "torn-Q8_0.gguf")).served_model_name == "torn"
    given = PipelineConfig(model_path=str(tmp_path / file), served_model_name="mine")
    assert (given.served_model_name, given.served_model_aliases) == ("mine", (file,))


def test_several_names_are_a_name_and_aliases() -> None:
    config = PipelineConfig(model_path="m", served_model_name=["a", "b", "c,d"], served_model_aliases="b,e")
    assert (config.served_model_name, config.served_model_aliases) == ("a", ("b", "c", "d", "e"))
    assert PipelineConfig(model_path="m", served_model_name="a").served_model_aliases == ()
    assert config.replace(max_length=5).served_model_aliases == ("b", "c", "d", "e")


def test_replace_validates_and_lets_values_follow() -> None:
    config = PipelineConfig(model_path="owner/one", max_length=7)
    other = config.replace(model="owner/two")
    assert (other.served_model_name, other.max_length) == ("owner/two", 7)
    with pytest.raises(SettingsError):
        config.replace(max_length=0)


def test_pickle_keeps_what_was_given() -> None:
    config = PipelineConfig(model_path="m", max_length=7)
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.model_fields_set == {"model_path", "max_length"}


def test_device_choice() -> None:
    assert DeviceChoice.parse("auto") == DeviceChoice("auto")
    assert DeviceChoice.parse("gpu:1,0") == DeviceChoice("gpu", (1, 0))
    for wrong in ("gpu:", "gpu:a", "gpu:0,", "GPU", "cpu:0", "gpu:0,0", ""):
        with pytest.raises(ValueError):
            DeviceChoice.parse(wrong)


def test_named_gpus_must_be_as_many_as_ranks() -> None:
    assert PipelineConfig(model_path="m", devices="gpu:0,1", tensor_parallel_size=2).device_choice.ids == (0, 1)
    assert "names 2 GPUs, but tensor_parallel_size is 1" in sentence(model_path="m", devices="gpu:0,1")
    assert "Ray picks them" in sentence(ServeConfig, devices="gpu:0")


def test_serve_config_needs_no_model_path() -> None:
    assert ServeConfig().model_path == ""


def test_only_loopback_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "127.8.0.1", "localhost", "::1", "[::1]"):
        assert ServeConfig(host=host).host == host
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.com", "localhost.example.com"):
        assert "MAX_RAY_API_KEYS" in sentence(ServeConfig, host=host)
        assert ServeConfig(host=host, api_keys=["k"]).host == host
    monkeypatch.setenv("MAX_RAY_API_KEYS", "a, b")
    assert ServeConfig(host="0.0.0.0").key_values == ("a", "b")
    monkeypatch.setenv("MAX_RAY_API_KEYS", " , ")
    assert "MAX_RAY_API_KEYS" in sentence(ServeConfig, host="0.0.0.0")


def test_an_empty_key_is_no_key() -> None:
    for blank in ("", " "):
        assert "api_keys should be" in sentence(ServeConfig, host="0.0.0.0", api_keys=["k", blank])


def test_keys_are_never_printed() -> None:
    config = ServeConfig(api_keys="hush-1,hush-2")
    assert config.key_values == ("hush-1", "hush-2")
    for text in (repr(config), str(config), str(config.model_dump()), config.model_dump_json()):
        assert "hush" not in text
    assert "hush" not in sentence(ServeConfig, api_keys={"hush": 1})
    assert "hush" not in sentence(ServeConfig, api_keys="hush", host="0.0.0.0", port=0)
    assert pickle.loads(pickle.dumps(config)).key_values == config.key_values


def test_replicas_in_order() -> None:
    assert "max_replicas=1 is less than min_replicas=2" in sentence(ServeConfig, min_replicas=2)


@pytest.mark.parametrize("port", [0, 65536, -1, "http"])
def test_ports(port: Any) -> None:
    assert "port" in sentence(ServeConfig, port=port)


def test_typed_builders_get_the_same_sentence() -> None:
    """Ray Serve calls model_validate on the builder's annotation."""
    assert ServeConfig.model_validate({"tensor_parallel_size": "2"}).tensor_parallel_size == 2
    with pytest.raises(ConfigError, match=r"There is no setting 'prt'\. Did you mean 'port'"):
        ServeConfig.model_validate({"prt": 1})


def test_is_loopback() -> None:
    assert is_loopback("127.0.0.1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("")


def test_parsers_are_checked() -> None:
    assert PipelineConfig(model_path="m", tool_call_parser="deepseek_v31").tool_call_parser == "deepseek_v3"
    assert PipelineConfig(model_path="m", reasoning_parser="none").reasoning_parser == "none"
    with pytest.raises(SettingsError, match=r"tool_call_parser should be one of auto, .*, not 'hermse'\. Did you mean"):
        PipelineConfig(model_path="m", tool_call_parser="hermse")


@pytest.mark.parametrize("text", ["", "20000", "20000-", "0-5", "20-10", "1-65536", "a-b", "20000-20999 "])
def test_worker_port_range_is_two_ports(text: str) -> None:
    with pytest.raises(SettingsError, match="worker_port_range"):
        ServeConfig(worker_port_range=text)


def test_worker_port_range_is_understood() -> None:
    assert parse_port_range("20000-20999") == (20000, 20999)
    assert ServeConfig(worker_port_range="1-65535").worker_port_range == "1-65535"
    assert ServeConfig(worker_port_range="none").worker_port_range is None
