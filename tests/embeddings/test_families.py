"""Every encoder family against transformers: float32 within 1e-4, batches of unequal lengths, ranks, bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from max_ray.errors import ConfigError, ParallelismError
from tests.embeddings.checkpoints import FAMILIES, make_encoder, random_rows, reference_vectors
from tests.embeddings.in_process import embed_in_process
from tests.embeddings.parity import LIMIT, are_within_limits, measure

_REPEATED = (
    *("roberta with a head", "camembert", "qwen2 without a head", "qwen3 both ways", "gemma3 without a head"),
    *("distilbert with a head", "nomic_bert with a head"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in _REPEATED else []) for name in FAMILIES]
)
def test_parity(name: str, tmp_path: Path) -> None:
    for ranks, numbers in measure(name, tmp_path / "model").items():
        assert are_within_limits(numbers), f"{ranks} ranks: {numbers}"


def test_a_text_longer_than_a_step_runs_alone(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "modern_bert")
    rows = random_rows([5, 600, 6, 30, 3], seed=1)
    expected = reference_vectors(folder, rows, "modern_bert")
    assert np.abs(embed_in_process(folder, rows, max_batch_input_tokens=12) - expected).max() < LIMIT


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("modern_bert", {"tensor_parallel_size": 2}, "one device only"),
        ("bert", {"tensor_parallel_size": 3}, "num_attention_heads=4 cannot be divided"),
        ("bert", {"max_length": 65}, "Use max_length=64 or less"),
        ("xlm_roberta", {"max_length": 65}, "Use max_length=64 or less"),
        ("bert", {"kv_cache_memory": 1.0}, "no KV cache"),
        ("bert", {"expert_parallel": True}, "no experts"),
        ("bert", {"quantization_encoding": "q8_0"}, "does not support quantization_encoding=q8_0"),
        ("bert", {"task": "text_generation"}, "known for embeddings_generation, but not for text_generation"),
    ],
)
def test_refused_before_loading(
    name: str, settings: dict[str, object], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_encoder(tmp_path / "model", name)
    monkeypatch.delattr("max_ray.modeling.network_model.load_network")
    with pytest.raises(ConfigError, match=sentence) as caught:
        embed_in_process(folder, ["a"], **settings)
    assert ("device only" in sentence or "divided" in sentence) == isinstance(caught.value, ParallelismError)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("bert", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
        ("bert", {"is_decoder": True}, "describes a decoder"),
        ("xlm_roberta", {"position_embedding_type": "relative_key"}, "has 'absolute' only"),
        ("mpnet", {"relative_attention_num_buckets": 16}, "has 32 only"),
        ("modern_bert", {"layer_types": ["full_attention"]}, "names 1 layers"),
    ],
)
def test_configurations_that_a_family_lacks(
    name: str, changes: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    folder = make_encoder(tmp_path / "model", name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError, match=sentence):
        embed_in_process(folder, ["a"])
