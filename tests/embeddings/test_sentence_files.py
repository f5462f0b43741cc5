"""What the files beside config.json say, and what the pipeline makes of it: pooling, dense stages, length, prompt."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from max_ray.config import PipelineConfig
from max_ray.engine.pooling_head import POOLINGS
from max_ray.errors import ConfigError, InputError, InputTooLongError, WeightsError
from max_ray.interfaces import EmbeddingsGenerationRequest, PipelineTask, RequestID
from max_ray.pipelines import PIPELINE_REGISTRY, EmbeddingsTokenizer, resolve_plan
from max_ray.sentence_files import POOLING_MODES, SentenceFiles
from tests.embeddings.checkpoints import (
    make_encoder,
    random_rows,
    reference_hidden,
    reference_vectors,
    write_json,
    write_sentence_files,
)
from tests.embeddings.in_process import embed_in_process


def naive_pooling(mode: str, hidden: torch.Tensor) -> torch.Tensor:
    """One text [n, D] -> [D], as the definition reads."""
    weights = torch.arange(1.0, len(hidden) + 1).unsqueeze(-1)
    return {
        "cls": hidden[0],
        "lasttoken": hidden[-1],
        "max": hidden.amax(0),
        "mean": hidden.mean(0),
        "mean_sqrt_len_tokens": hidden.sum(0) / len(hidden) ** 0.5,
        "weightedmean": (hidden * weights).sum(0) / weights.sum(),
    }[mode]


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooling(mode: str) -> None:
    texts = [torch.randn(n, 5) for n in (3, 1, 4)]
    pooled = POOLINGS[mode](torch.cat(texts), torch.tensor([0, 3, 4, 8]))
    torch.testing.assert_close(pooled, torch.stack([naive_pooling(mode, text) for text in texts]))


def test_several_poolings_and_a_dense_stage(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "bert")
    write_sentence_files(folder, pooling="mean+cls", dense=(64, 10), normalize=True)
    rows = random_rows([4, 9])
    plan = resolve_plan(PipelineConfig(model_path=str(folder)))
    assert plan.embedding_size == 10
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    expected = []
    for hidden in reference_hidden(folder, rows, "bert"):
        joined = torch.cat([hidden[0], hidden.mean(0)])  # cls comes first, whatever the order in the file
        vector = torch.tanh(weights["linear.weight"] @ joined + weights["linear.bias"])
        expected.append((vector / vector.norm()).numpy())
    assert np.abs(embed_in_process(folder, rows) - np.stack(expected)).max() < 1e-5


def test_a_dense_stage_of_other_weights_is_refused(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "bert")
    write_sentence_files(folder, dense=(32, 10))
    write_json(folder / "2_Dense" / "config.json", {"in_features": 32, "out_features": 11})
    with pytest.raises(WeightsError, match="2_Dense should hold"):
        embed_in_process(folder, ["a"])


def test_without_the_files_the_family_decides(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "bert")
    (folder / "modules.json").unlink()
    rows = random_rows([4, 9])
    expected = reference_vectors(folder, rows, "bert", "mean", normalize=False)
    assert np.abs(embed_in_process(folder, rows) - expected).max() < 1e-5


def test_the_newer_form_of_the_pooling_file(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "bert")
    write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": "lasttoken"})
    assert SentenceFiles.read(folder, "mean").pooling == ("lasttoken",)
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": ["mean", "cls"]})
    assert SentenceFiles.read(folder, "mean").pooling == ("cls", "mean")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("1_Pooling/config.json", {"pooling_mode_attention": True}, "asks for the pooling pooling_mode_attention"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": False}, "asks for the pooling of nothing"),
        ("modules.json", [{"type": "my.WordWeights", "path": ""}], "has the stage"),
        ("modules.json", ["Transformer"], "has the stage 'Transformer'"),
        ("modules.json", [{"type": "a.Pooling", "path": "1_Pooling"}], "has the stages Pooling"),
        ("modules.json", {}, "must hold a JSON list"),
        ("sentence_bert_config.json", {"max_seq_length": "many"}, "must be a positive integer"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "not among its prompts"),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 0}, "is not supported"),
    ],
)
def test_what_is_not_supported_is_said(file: str, content: Any, sentence: str, tmp_path: Path) -> None:
    write_sentence_files(tmp_path, dense=(32, 10))
    write_json(tmp_path / file, content)
    with pytest.raises(ConfigError, match=sentence):
        SentenceFiles.read(tmp_path, "mean")


def test_the_length_of_the_files_and_of_the_user(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "bert")
    write_sentence_files(folder, max_seq_length=20)
    plan = resolve_plan(PipelineConfig(model_path=str(folder)))
    assert (plan.max_length, plan.origins["max_length"]) == (20, "model: sentence_bert_config.json")
    assert resolve_plan(PipelineConfig(model_path=str(folder), max_length=40)).max_length == 40
    write_sentence_files(folder, max_seq_length=5000)
    assert resolve_plan(PipelineConfig(model_path=str(folder))).max_length == 64
    (folder / "sentence_bert_config.json").unlink()
    write_json(folder / "sentence_xlm-roberta_config.json", {"max_seq_length": 30})
    assert resolve_plan(PipelineConfig(model_path=str(folder))).max_length == 30


def tokens_of(tokenizer: EmbeddingsTokenizer, text: str | list[int], truncate: bool = False) -> list[int]:
    request = EmbeddingsGenerationRequest(RequestID(), input=text, truncate=truncate)
    return asyncio.run(tokenizer.new_context(request)).tokens.tolist()


def test_too_long_is_refused_or_cut(tiny_bert: Path) -> None:
    tokenizer = EmbeddingsTokenizer(tiny_bert, max_length=6)
    whole = tokens_of(tokenizer, "abcde")
    assert len(whole) == 6
    with pytest.raises(InputTooLongError, match="has 7 tokens, but this model embeds 6 at most"):
        tokens_of(tokenizer, "abcdef")
    with pytest.raises(InputTooLongError, match="at least"):
        tokens_of(tokenizer, "abcdef" * 1000)
    assert tokens_of(tokenizer, "abcdef", truncate=True) == whole
    assert tokens_of(tokenizer, "abcde" * 2000, truncate=True) == whole
    assert tokens_of(tokenizer, "abc", truncate=True) == tokens_of(tokenizer, "abc")
    assert tokens_of(tokenizer, [9, 8, 7, 6, 5, 4], truncate=False) == [9, 8, 7, 6, 5, 4]
    assert tokens_of(tokenizer, [9, 8, 7, 6, 5, 4, 3], truncate=True) == [9, 8, 7, 6, 5, 4]


@pytest.mark.parametrize("bad", ["", [], [1, 100_000], [-1], "\ud800"])
def test_inputs_that_are_refused(bad: str | list[int], tiny_bert: Path) -> None:
    with pytest.raises(InputError) as caught:
        tokens_of(EmbeddingsTokenizer(tiny_bert, max_length=6), bad)
    assert caught.value.param == "input"


def test_prompt_and_case(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "bert")
    plain = EmbeddingsTokenizer(folder, max_length=64)
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"q": "Ask: "}, "default_prompt_name": "q"})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": True})
    prompted = EmbeddingsTokenizer(folder, max_length=64)
    assert tokens_of(prompted, "WHY") == tokens_of(plain, "ask: why")
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": "mean", "include_prompt": False})
    with pytest.raises(ConfigError, match="include_prompt=false"):
        EmbeddingsTokenizer(folder, max_length=64)


def test_the_task_follows_from_the_model(tiny_bert: Path, tmp_path: Path) -> None:
    embedder = make_encoder(tmp_path / "qwen", "qwen3", pooling="lasttoken")

    def task(folder: Path, **settings: Any) -> PipelineTask:
        return resolve_plan(PipelineConfig(model_path=str(folder), **settings)).task

    assert task(tiny_bert) is task(embedder) is PipelineTask.EMBEDDINGS_GENERATION
    assert task(embedder, task="text_generation") is PipelineTask.TEXT_GENERATION
    (embedder / "modules.json").unlink()
    assert task(embedder) is PipelineTask.TEXT_GENERATION
    assert task(embedder, task="embeddings_generation") is PipelineTask.EMBEDDINGS_GENERATION
    config = PipelineConfig(model_path=str(embedder), task="embeddings_generation")
    with pytest.raises(ConfigError, match="Leave the setting out"):
        PIPELINE_REGISTRY.retrieve(config, PipelineTask.TEXT_GENERATION)


def test_the_plan_has_no_cache(tiny_bert: Path) -> None:
    plan = resolve_plan(PipelineConfig(model_path=str(tiny_bert)))
    assert (plan.num_blocks, plan.memory.kv_cache, plan.memory.shortage) == (0, 0, 0)
    assert plan.memory.requests_at_once(64) == plan.max_batch_size
    assert "none: a text is embedded in one step" in plan.memory.text()


@pytest.mark.parametrize(("dim", "kept"), [(5, 5), (32, 32), (900, 32)])
def test_vectors_that_are_cut(dim: int, kept: int, tmp_path: Path) -> None:
    """sentence-transformers keeps the first numbers of the vector at the end, and does not scale it again."""
    folder = make_encoder(tmp_path / "model", "bert")
    whole = embed_in_process(folder, ["a text", "another one"])
    write_json(folder / "config_sentence_transformers.json", {"truncate_dim": dim})
    np.testing.assert_array_equal(embed_in_process(folder, ["a text", "another one"]), whole[:, :kept])
    assert resolve_plan(PipelineConfig(model_path=str(folder))).embedding_size == kept


def test_a_cut_that_is_no_number(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "bert")
    write_json(folder / "config_sentence_transformers.json", {"truncate_dim": 0})
    with pytest.raises(ConfigError, match="truncate_dim must be a positive integer, not 0"):
        resolve_plan(PipelineConfig(model_path=str(folder)))
