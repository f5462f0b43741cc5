"""Repositories of the Hugging Face hub as local files: from the local cache first, downloaded where they are not there.

`owner/name` is a folder in Hugging Face's layout, or a repository with one GGUF model; `owner/name:Q4_K_M` is the GGUF
model with that in its name, as llama.cpp and vLLM write it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from max_ray.errors import ModelPathError
from max_ray.gguf import first_parts, part_names

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_REPOSITORY = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<tag>\w[\w.-]*))?")
_SECOND_COPIES = ["consolidated*.safetensors", "original/*"]
"""The weights once more, as their maker's own programs read them."""
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "*.bpe.model",
    "spiece.model",
)
_MAX_NAMED = 20


def is_repository(text: str) -> bool:
    """True for "owner/name" and "owner/name:tag"."""
    return _REPOSITORY.fullmatch(text) is not None and ".." not in text and "--" not in text


def pulled(repository: str, revision: str | None) -> Path:
    """The same as `local_copy` with what the hub has now. Raises ModelPathError."""
    match = _REPOSITORY.fullmatch(repository)
    assert match is not None, "is_repository was asked"
    return _fetched(match["id"], match["tag"], revision)


class _NotHadError(ModelPathError):
    """The hub does not have it, or cannot be reached."""


def local_copy(repository: str, revision: str | None) -> Path:
    """The folder of a snapshot, or the (first) file of a GGUF model in it.

    Without a tag, a GGUF model in the cache says nothing of what else the repository has: the hub is asked, and the one
    in the cache taken only where the hub cannot be. Raises ModelPathError for a repository that cannot be had, or that
    has no GGUF model of this name, or several.
    """
    match = _REPOSITORY.fullmatch(repository)
    assert match is not None, "is_repository was asked"
    repo_id, tag = match["id"], match["tag"]
    cached = _cached(repo_id, revision)
    has_weights = tag is None and cached is not None and _has_weights(cached)
    if cached is not None and has_weights and any(file.is_file() for kind in _TOKENIZERS for file in cached.glob(kind)):
        return cached
    model = None if cached is None else _whole_model(cached, tag)
    if tag is not None and model is not None:
        return model
    try:
        return _fetched(repo_id, tag, revision)
    except _NotHadError:
        if cached is not None and has_weights:
            return cached  # an unknown kind of tokenizer; the code that needs one says so
        if model is None:
            raise
        return model


def _fetched(repo_id: str, tag: str | None, revision: str | None) -> Path:
    if tag is None:
        folder = _download(repo_id, revision, _PATTERNS)
        if any(folder.glob("*.safetensors")):
            return folder
    models = _listed(repo_id, revision)
    if tag is None and not models:
        return folder
    chosen = _chosen(repo_id, tag, models)
    return _download(repo_id, revision, part_names(chosen)) / chosen


def _chosen(repo_id: str, tag: str | None, models: Sequence[str]) -> str:
    """The GGUF model that is meant."""
    found = _matching(models, tag)
    if len(found) == 1:
        return found[0]
    named = ", ".join((found or models)[:_MAX_NAMED]) or "none"
    which = f"{len(found)} GGUF models" + (f" with {tag!r} in their names" if tag else "")
    raise ModelPathError(
        f"The Hugging Face repository {repo_id} has {which}, not one: give owner/name:part-of-the-name, as in "
        f"{repo_id}:Q4_K_M. It has {named}."
    )


def _matching(models: Sequence[str], tag: str | None) -> list[str]:
    """Those with the tag in their file's name, between separators; all without a tag."""
    if tag is None:
        return list(models)
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(tag)}(?=[-._]|$)", re.IGNORECASE)
    return [name for name in models if pattern.search(name)]


def _whole_model(folder: Path, tag: str | None) -> Path | None:
    """The GGUF model in a snapshot that is meant, where it is the only one and all its parts are there."""
    files = first_parts(file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf"))
    found = _matching(files, tag)
    is_whole = len(found) == 1 and all((folder / name).is_file() for name in part_names(found[0]))
    return folder / found[0] if is_whole else None


def _has_weights(folder: Path) -> bool:
    """False for a snapshot without weights that another program fetched, or whose download was cut short."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(file.is_file() for file in folder.glob("*.safetensors"))  # a link may lead nowhere
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # cut short itself; reading the weights says what is wrong where the hub's own is so
    return all((folder / name).is_file() for name in shards)


def _cached(repo_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _download(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        _asked(repo_id, revision, snapshot_download, allow_patterns=list(patterns), ignore_patterns=_SECOND_COPIES)
    )


def _listed(repo_id: str, revision: str | None) -> list[str]:
    """The repository's GGUF models, by their first files."""
    from huggingface_hub import list_repo_files

    return first_parts(name for name in _asked(repo_id, revision, list_repo_files) if name.endswith(".gguf"))


def _asked(repo_id: str, revision: str | None, function: Any, **options: Any) -> Any:
    """What the hub answers. Raises ModelPathError."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    of_http_library: type[Exception] = HfHubHTTPError.__bases__[0]  # versions of the hub's client differ in which one
    try:
        return function(repo_id, revision=revision, **options)
    except (of_http_library, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise _NotHadError(
            f"There is no folder {repo_id}, and the Hugging Face repository {repo_id}{at} could not be had: "
            f"{_reason(repo_id, error)}."
        ) from error


def _reason(repo_id: str, error: Exception) -> str:
    """Half a sentence in place of the hub's paragraph."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "it is not in the local cache, and HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return f"accept its terms at https://huggingface.co/{repo_id}, and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has none of this name, or it is private (set HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
