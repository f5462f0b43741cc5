"""Which GGUF model of a repository is meant, and when the hub is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from max_ray.errors import ModelPathError
from max_ray.hub import pulled
from max_ray.huggingface import resolve_model_path

MODELS = [
    "Tiny-1B-Q4_K_M.gguf",
    "Tiny-1B-Q4_K_S.gguf",
    "Tiny-1B-UD-Q8_0.gguf",
    "mmproj-Tiny-1B-F16.gguf",
    "BF16/Tiny-1B-BF16-00001-of-00002.gguf",
    "BF16/Tiny-1B-BF16-00002-of-00002.gguf",
]


class Hub:
    """A repository whose downloads land in a folder, as a snapshot does."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files
        self.downloads: list[list[str]] = []
        self.is_cached = False
        self.is_reachable = True

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        assert (repo_id, options["revision"]) == ("owner/name", None)
        if options.get("local_files_only"):
            if not self.is_cached:
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.folder)
        if not self.is_reachable:
            raise LocalEntryNotFoundError("no network")
        patterns, ignored = options["allow_patterns"], options["ignore_patterns"]
        self.downloads.append(patterns)
        self.is_cached = True
        for name in self.files:
            if any(map(Path(name).match, patterns)) and not any(map(Path(name).match, ignored)):
                file = self.folder / name
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(b"")
        return str(self.folder)

    def list_repo_files(self, repo_id: str, revision: str | None) -> list[str]:
        if not self.is_reachable:
            raise LocalEntryNotFoundError("no network")
        return [*self.files, "README.md"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path, MODELS)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", made.list_repo_files)
    return made


@pytest.mark.parametrize(
    ("tag", "file"),
    [("Q4_K_M", MODELS[0]), ("q4_k_s", MODELS[1]), ("UD-Q8_0", MODELS[2]), ("Q8_0", MODELS[2]), ("BF16", MODELS[4])],
)
def test_a_tag_names_one_model(hub: Hub, tag: str, file: str) -> None:
    assert resolve_model_path(f"owner/name:{tag}") == hub.folder / file
    parts = MODELS[4:] if tag == "BF16" else [file]
    assert hub.downloads == [parts], "nothing else is fetched"
    assert resolve_model_path(f"owner/name:{tag}") == hub.folder / file
    assert len(hub.downloads) == 1, "the cache has it"


@pytest.mark.parametrize("tag", ["Q4", "Q5_K_M", "F16", "Tiny"])
def test_a_tag_that_names_none_or_several_is_refused_with_the_names(hub: Hub, tag: str) -> None:
    with pytest.raises(ModelPathError, match=r"GGUF models with .* owner/name:Q4_K_M\. It has .*Tiny-1B-Q4_K_M.gguf"):
        resolve_model_path(f"owner/name:{tag}")
    assert hub.downloads == []


def test_without_a_tag_a_lone_model_is_taken_and_several_are_refused(hub: Hub) -> None:
    with pytest.raises(ModelPathError, match="4 GGUF models, not one"):
        resolve_model_path("owner/name")
    hub.files = MODELS[2:4]
    assert resolve_model_path("owner/name") == hub.folder / MODELS[2]


def test_a_model_that_was_fetched_by_its_tag_does_not_stand_for_the_repository(hub: Hub) -> None:
    hub.files = [MODELS[0], "config.json", "model.safetensors", "tokenizer.json"]
    model = resolve_model_path("owner/name:Q4_K_M")
    hub.is_reachable = False
    assert resolve_model_path("owner/name") == model, "all there is"
    hub.is_reachable = True
    assert resolve_model_path("owner/name") == hub.folder
    hub.is_reachable = False
    assert resolve_model_path("owner/name") == hub.folder
    with pytest.raises(ModelPathError, match="could not be had: no network"):
        resolve_model_path("owner/name:Q8_0")


@pytest.mark.parametrize("index", [b"{", b"[]", b"{}", b'{"weight_map": 3}'])
def test_an_index_that_was_cut_short_is_fetched_again(hub: Hub, index: bytes) -> None:
    hub.files = ["config.json", "model.safetensors.index.json", "1.safetensors"]
    resolve_model_path("owner/name")
    (hub.folder / "model.safetensors.index.json").write_bytes(index)
    hub.downloads.clear()
    assert resolve_model_path("owner/name") == hub.folder
    assert len(hub.downloads) == 1


def test_a_model_of_which_a_part_is_missing_is_fetched_again(hub: Hub) -> None:
    first = resolve_model_path("owner/name:BF16")
    (hub.folder / MODELS[5]).unlink()
    assert resolve_model_path("owner/name:BF16") == first
    assert len(hub.downloads) == 2
    assert (hub.folder / MODELS[5]).exists()


def test_a_folder_of_that_name_comes_before_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name:Q4_K_M").mkdir(parents=True)
    (tmp_path / "owner" / "name:Q4_K_M" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("owner/name:Q4_K_M") == tmp_path / "owner" / "name:Q4_K_M"
    assert hub.downloads == []


def test_a_hub_that_cannot_be_reached_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing files lets the HTTP library's own error through."""
    library = sys.modules[HfHubHTTPError.__bases__[0].__module__]

    def unreachable(repo_id: str, revision: str | None) -> list[str]:
        raise library.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    with pytest.raises(ModelPathError, match="owner/name could not be had: Name or service not known"):
        resolve_model_path("owner/name:Q4_K_M")


def test_a_tag_behind_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelPathError, match="owner/name is a local folder, and owner/name:Q4_K_M names"):
        resolve_model_path("owner/name:Q4_K_M")


def test_a_snapshot_without_tokenizer_is_completed_where_the_hub_can_be_reached(hub: Hub) -> None:
    """Another program has fetched the network alone."""
    hub.files = ["config.json", "model.safetensors", "tokenizer.json"]
    resolve_model_path("owner/name")
    (hub.folder / "tokenizer.json").unlink()
    hub.is_reachable = False
    assert resolve_model_path("owner/name") == hub.folder
    hub.is_reachable = True
    assert resolve_model_path("owner/name") == hub.folder
    assert (hub.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "tekken.json", "tiktoken.model"])
def test_a_snapshot_with_a_tokenizer_is_not_fetched_again(tokenizer: str, hub: Hub) -> None:
    hub.files = ["config.json", "model.safetensors", tokenizer]
    resolve_model_path("owner/name")
    num_downloads = len(hub.downloads)
    assert resolve_model_path("owner/name") == hub.folder
    assert len(hub.downloads) == num_downloads


def test_weights_in_a_second_layout_are_not_fetched(hub: Hub) -> None:
    hub.files = ["config.json", "model-00001-of-00001.safetensors", "consolidated.safetensors", "tokenizer.json"]
    resolve_model_path("owner/name")
    assert not (hub.folder / "consolidated.safetensors").exists()
    assert (hub.folder / "model-00001-of-00001.safetensors").is_file()


@pytest.mark.parametrize("beside", ["mmproj-model-f16.gguf", "imatrix.gguf"])
def test_projectors_and_importance_matrices_beside_a_model_are_no_models(beside: str, tmp_path: Path) -> None:
    for name in (beside, "Tiny-1B-Q4_K_M.gguf"):
        (tmp_path / name).write_bytes(b"")
    assert resolve_model_path(tmp_path) == tmp_path / "Tiny-1B-Q4_K_M.gguf"


def test_links_to_files_that_are_gone_are_fetched_again(hub: Hub) -> None:
    hub.files = ["config.json", "model.safetensors", "tokenizer.json"]
    resolve_model_path("owner/name")
    (hub.folder / "model.safetensors").unlink()
    (hub.folder / "model.safetensors").symlink_to("../../blobs/gone")
    hub.is_reachable = False
    with pytest.raises(ModelPathError, match="could not be had: no network"):
        resolve_model_path("owner/name")


def test_a_pull_asks_the_hub_though_the_model_is_cached(hub: Hub) -> None:
    hub.files = ["config.json", "model.safetensors", "tokenizer.json"]
    resolve_model_path("owner/name")
    resolve_model_path("owner/name")
    assert len(hub.downloads) == 1
    assert pulled("owner/name", None) == hub.folder
    assert len(hub.downloads) == 2
    hub.files = MODELS
    assert pulled("owner/name:Q4_K_M", None) == hub.folder / MODELS[0]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GatedRepoError, "accept its terms at https://huggingface.co/owner/name, and set HF_TOKEN."),
        (RepositoryNotFoundError, "the hub has none of this name, or it is private (set HF_TOKEN)."),
        (RevisionNotFoundError, "it has no such revision."),
        (HfHubHTTPError, "Server error."),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, error: type[HfHubHTTPError], reason: str
) -> None:
    library = sys.modules[HfHubHTTPError.__bases__[0].__module__]
    response = library.Response(403, request=library.Request("GET", "https://hub.example"))

    def refuse(repo_id: str, revision: str | None) -> list[str]:
        raise error("Server error. Please\n try again later. See the page.", response=response)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    with pytest.raises(ModelPathError) as caught:
        pulled("owner/name:Q4_K_M", None)
    assert str(caught.value).endswith(f"owner/name could not be had: {reason}")
