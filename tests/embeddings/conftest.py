"""The encoder families, and a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from max_ray.pipelines import PIPELINE_REGISTRY
from tests.embeddings.checkpoints import make_encoder
from tests.embeddings.in_process import register_families


@pytest.fixture(autouse=True)
def families() -> Iterator[None]:
    register_families()
    yield
    PIPELINE_REGISTRY.reset()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("embeddings") / "tiny-bert", "bert")
