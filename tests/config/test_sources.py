"""load_config: precedence, origins, unknown keys in every source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from max_ray import settings
from max_ray.config import PipelineConfig, ServeConfig, SettingsError, load_config, sources
from max_ray.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_each_source_overrides_the_one_below(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "model: from-file\nmax_length: 1\nport: 1111\nmax_num_steps: 7\n")
    environ = {"MAX_RAY_MAX_LENGTH": "2", "MAX_RAY_PORT": "2222", "OTHER": "x", "MAX_RAY_HOST": ""}
    config, origins = load_config(
        ServeConfig, {"port": 3333}, config_file=file, environ=environ, defaults={"app_name": "a", "max_length": 9}
    )
    assert (config.model_path, config.max_length, config.port, config.app_name) == ("from-file", 2, 3333, "a")
    assert config.max_num_steps == 7
    assert config.host == "127.0.0.1"
    assert origins["model_path"] == f"file {file}"
    assert origins["max_length"] == "environment MAX_RAY_MAX_LENGTH"
    assert origins["port"] == "argument"
    assert origins["app_name"] == origins["host"] == "default"
    assert set(origins) == set(ServeConfig.model_fields)


def test_config_file_from_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "model_path: m\nmax_length: 5\n")
    config, _ = load_config(PipelineConfig, {}, environ={"MAX_RAY_CONFIG": str(file)})
    assert config.max_length == 5
    other = write(tmp_path / "d.yaml", "model_path: m\nmax_length: 6\n")
    config, _ = load_config(PipelineConfig, {}, config_file=other, environ={"MAX_RAY_CONFIG": str(file)})
    assert config.max_length == 6


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_RAY_MODEL", "m")
    monkeypatch.setenv("MAX_RAY_MAX_BATCH_SIZE", "3")
    config, origins = load_config(PipelineConfig, {})
    assert (config.model_path, config.max_batch_size) == ("m", 3)
    assert origins["model_path"] == "environment MAX_RAY_MODEL_PATH"


@pytest.mark.parametrize(("variable", "meant"), [("MAX_RAY_PROT", "MAX_RAY_PORT"), ("MAX_RAY_CONFG", "MAX_RAY_CONFIG")])
def test_a_variable_that_nothing_reads_is_warned_of(
    variable: str, meant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources._logger, "propagate", True)
    load_config(PipelineConfig, {"model_path": "m"}, environ={variable: "1"})
    assert f"{variable}: it is ignored. Did you mean '{meant}'?" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "environ", "text", "message"),
    [
        ({"modl_path": "m"}, {}, "", "There is no setting 'modl_path'. Did you mean 'model_path'? (Set by: argument.)"),
        ({}, {}, "hots: 1", "There is no setting 'hots'. Did you mean 'host'? (Set by: file "),
        ({}, {"MAX_RAY_PORT": "x"}, "", "not 'x'. (Set by: environment MAX_RAY_PORT.)"),
        ({}, {}, "port: [1]", "port should be a valid integer, not [1]. (Set by: file "),
        ({}, {}, "model: a\nmodel_path: b", "are the same setting: give one of them."),
    ],
)
def test_mistakes_name_their_source(
    tmp_path: Path, arguments: dict[str, Any], environ: dict[str, str], text: str, message: str
) -> None:
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(SettingsError) as caught:
        load_config(ServeConfig, arguments, config_file=file, environ=environ)
    assert message in str(caught.value)


def test_shared_sources_may_hold_settings_of_other_commands(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "model_path: m\nport: 1\n")
    config, origins = load_config(PipelineConfig, {}, config_file=file, environ={"MAX_RAY_HOST": "localhost"})
    assert config.model_path == "m"
    assert "port" not in origins
    with pytest.raises(SettingsError, match="There is no setting 'port'"):
        load_config(PipelineConfig, {"model_path": "m", "port": 1}, environ={})


def test_a_file_that_is_not_yaml_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ServeConfig, {}, config_file=write(tmp_path / "c.yaml", "port: 1\napi_keys: hush: 1\n"), environ={})
    assert "hush" not in str(caught.value)
    assert "(line 2)" in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "1: 2", "a: [", "a: b: c", "\x00"])
def test_files_that_hold_no_settings(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(ServeConfig, {}, config_file=file, environ={})
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no configuration file"):
        load_config(ServeConfig, {}, config_file=tmp_path / "none.yaml", environ={})
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(ServeConfig, {}, config_file=tmp_path, environ={})


def test_a_setting_twice_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be used: port is given twice \(line 3\)"):
        load_config(ServeConfig, {}, config_file=write(tmp_path / "c.yaml", "port: 1\nhost: x\nport: 2\n"), environ={})


def test_an_empty_file_is_no_mistake(tmp_path: Path) -> None:
    config, _ = load_config(ServeConfig, {}, config_file=write(tmp_path / "c.yaml", ""), environ={})
    assert config.port == 8000


def test_keys_from_the_environment_argument_count_for_the_host() -> None:
    config, _ = load_config(ServeConfig, {"host": "0.0.0.0"}, environ={"MAX_RAY_API_KEYS": "k"})
    assert config.key_values == ("k",)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAX_RAY_CACHE_DIR", str(tmp_path))
    assert settings.cache_dir() == tmp_path
    monkeypatch.delenv("MAX_RAY_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.cache_dir() == tmp_path / "max_ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert settings.cache_dir() == Path.home() / ".cache" / "max_ray"


def test_log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_RAY_LOG_LEVEL", raising=False)
    assert settings.log_level() == "INFO"
    monkeypatch.setenv("MAX_RAY_LOG_LEVEL", "debug")
    assert settings.log_level() == "DEBUG"
    monkeypatch.setenv("MAX_RAY_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="MAX_RAY_LOG_LEVEL"):
        settings.log_level()
