"""The families that score pairs, registered whether or not installed metadata knows them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from max_ray.pipelines import PIPELINE_REGISTRY
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.scores.checkpoints import register_families


@pytest.fixture(scope="module", autouse=True)
def _families() -> Iterator[None]:
    torch.set_num_threads(1)
    register_families()
    yield
    PIPELINE_REGISTRY.reset()


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("bytes")), max_length=200)
