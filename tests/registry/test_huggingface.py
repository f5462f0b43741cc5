"""config.json as attributes; model paths: each mistake has its own sentence. Offline."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from max_ray.errors import ConfigError, ModelPathError
from max_ray.huggingface import (
    HuggingFaceConfig,
    load_generation_config,
    load_huggingface_config,
    resolve_model_path,
)

VALUES = {"hidden_size": 8, "rope_parameters": {"rope_theta": 1.0}, "eos_token_id": [2, 3], "architectures": ["A"]}


def test_attributes_and_mapping() -> None:
    config = HuggingFaceConfig(VALUES, "x/config.json")
    assert config.hidden_size == config["hidden_size"] == config.get("hidden_size") == 8
    assert config.rope_parameters.rope_theta == 1.0
    assert config.get("head_dim") is None
    assert "hidden_size" in config
    assert config.to_dict() == VALUES
    assert config.architecture_names == ["A"]


def test_a_missing_key_is_named_with_its_file() -> None:
    with pytest.raises(AttributeError, match=r"x/config.json has no 'hiden_size'. Did you mean 'hidden_size'"):
        _ = HuggingFaceConfig(VALUES, "x/config.json").hiden_size
    with pytest.raises(AttributeError, match=r"x/config.json: rope_parameters has no 'factor'"):
        _ = HuggingFaceConfig(VALUES, "x/config.json").rope_parameters.factor


def test_read_only_and_copied() -> None:
    config = HuggingFaceConfig(VALUES)
    with pytest.raises(AttributeError, match="read-only"):
        config.hidden_size = 9
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert pickle.loads(pickle.dumps(config)).rope_parameters.rope_theta == 1.0


def test_end_of_sequence_ids() -> None:
    assert HuggingFaceConfig(VALUES).eos_token_ids() == {2, 3}
    assert HuggingFaceConfig(VALUES).eos_token_ids({"eos_token_id": 7}) == {7}
    assert HuggingFaceConfig({"eos_token_id": 0}).eos_token_ids({"eos_token_id": None}) == {0}
    assert HuggingFaceConfig({}).eos_token_ids() == frozenset()


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ModelPathError, match=r"no config.json"):
        load_huggingface_config(tmp_path)
    assert load_generation_config(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    (tmp_path / "generation_config.json").write_text('{"top_k": 8}')
    assert load_huggingface_config(tmp_path).hidden_size == 8
    assert load_generation_config(tmp_path) == {"top_k": 8}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""])
def test_files_that_are_not_json_objects(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_huggingface_config(tmp_path)


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(ModelPathError, match=r"There is no config.json in"):
        resolve_model_path(model)
    (model / "config.json").write_text("{}")
    assert resolve_model_path(model) == model
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("model") == model
    assert resolve_model_path("./model/") == model
    with pytest.raises(ModelPathError, match="is a file"):
        resolve_model_path(model / "config.json")
    with pytest.raises(ModelPathError, match="revision='main' has no meaning for the local folder"):
        resolve_model_path(model, "main")


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./no/folder", "nothing", "a/b/c", "a/..", "../b", "-a/b", "a b/c"]
)
def test_missing_folders_never_ask_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ModelPathError, match="There is no folder"):
        resolve_model_path(path)


def test_a_missing_gguf_file_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelPathError, match=r"There is no file models/tiny\.gguf"):
        resolve_model_path("models/tiny.gguf")


def test_repository_ids_come_from_the_cache_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        if len(calls) == 1 and fails:
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    fails = False
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve_model_path("owner/name", "v1") == tmp_path
    assert calls == [{"repo_id": "owner/name", "revision": "v1", "local_files_only": True}]
    calls.clear()
    fails = True
    assert resolve_model_path("owner/name") == tmp_path
    assert [call.get("local_files_only") for call in calls] == [True, None]


def test_a_cached_snapshot_in_part_is_completed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    downloads: list[str] = []

    def snapshot(repo_id: str, **options: Any) -> str:
        if not options.get("local_files_only"):
            downloads.append(repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *a, **k: [])
    index = '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    for name, text, complete in [
        ("tokenizer.json", "{}", False),
        ("config.json", "{}", False),
        ("1.safetensors", "", True),
        ("model.safetensors.index.json", index, False),
        ("2.safetensors", "", True),
    ]:
        (tmp_path / name).write_text(text)
        downloads.clear()
        assert resolve_model_path("owner/name") == tmp_path
        assert downloads == ([] if complete else ["owner/name"])


def test_no_such_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    response = httpx.Response(404, request=httpx.Request("GET", "http://hub.example/owner/name"))

    def snapshot(repo_id: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not in the cache")
        raise RepositoryNotFoundError("404: no such\nrepository", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelPathError) as caught:
        resolve_model_path("owner/name", "v1")
    assert str(caught.value).startswith(
        "There is no folder owner/name, and the Hugging Face repository owner/name at revision 'v1' could not be had:"
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("num_hidden_layers", wrong) for wrong in (0, -1, 1.5, "2", [2], True, 2**31)],
        ("hidden_size", {}),
        ("rms_norm_eps", "x"),
        ("rms_norm_eps", 10**30),
        ("rope_theta", 0),
        ("rope_scaling", "linear"),
        ("rope_parameters", {"rope_type": "linear", "factor": -1}),
        ("rope_parameters", {"rope_type": "linear", "factor": float("inf")}),
    ],
)
def test_numbers_that_no_network_can_have(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8, "head_dim": None, name: value}))
    with pytest.raises(ConfigError, match=r"config\.json: .*must be"):
        load_huggingface_config(tmp_path)


def test_json_that_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_huggingface_config(tmp_path)


def test_a_missing_key_is_a_mistake_of_the_folder() -> None:
    with pytest.raises(ConfigError, match="has no 'num_hidden_layers'"):
        HuggingFaceConfig({}).num_hidden_layers  # noqa: B018
