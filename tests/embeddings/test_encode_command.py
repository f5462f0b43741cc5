"""`max-ray encode`, and what the other commands say of an embedding model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from max_ray.cli.main import main
from max_ray.config import ServeConfig
from max_ray.interfaces import PipelineTask
from max_ray.serve.foreground import ready_message
from tests.embeddings.in_process import embed_in_process

SETTINGS = ["--num-threads", "1", "--devices", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_a_vector_a_line(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "encode", "--model-path", str(tiny_bert), *SETTINGS, "one", "another text")
    vectors = np.array([json.loads(line) for line in out.splitlines()])
    assert np.abs(vectors - embed_in_process(tiny_bert, ["one", "another text"])).max() < 1e-6


def test_standard_input_and_json(
    tiny_bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"one\n{'a' * 70}\n"))
    flags = ["--json", "--dimensions", "5", "--truncate"]
    answer: dict[str, Any] = json.loads(run(capsys, "encode", "--model-path", str(tiny_bert), *SETTINGS, *flags))
    assert answer["model"] == "tiny-bert"
    assert [(entry["index"], entry["num_tokens"]) for entry in answer["data"]] == [(0, 4), (1, 64)]
    (whole,) = embed_in_process(tiny_bert, ["one"])
    expected = whole[:5] / np.linalg.norm(whole[:5])
    assert np.abs(np.array(answer["data"][0]["embedding"]) - expected).max() < 1e-6


def test_mistakes(tiny_bert: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode = ["encode", "--model-path", str(tiny_bert), *SETTINGS]
    assert "Text 2: The input has 71 tokens" in refused(capsys, *encode, "a", "b" * 70)
    assert "vectors have 32 numbers" in refused(capsys, *encode, "--dimensions", "33", "a")
    assert "model_path is missing" in refused(capsys, "encode", "a")
    llama = ["--model-path", str(tiny_llama), *SETTINGS]
    assert "but not for embeddings_generation" in refused(capsys, "encode", *llama, "a")
    bert = ["--model-path", str(tiny_bert), "--prompt", "a", *SETTINGS]
    assert "but not for text_generation" in refused(capsys, "generate", *bert)


def test_check_compares_models_that_write(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is for embeddings_generation" in refused(
        capsys, "check", "architectures.bert", "--model-path", str(tiny_bert)
    )


def test_plan_and_warm_cache_know_the_task(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(run(capsys, "plan", "--model-path", str(tiny_bert), "--json"))
    assert (plan["task"], plan["kv_cache_blocks"]) == ("embeddings_generation", 0)
    assert "BertModel" in run(capsys, "warm-cache", "--model-path", str(tiny_bert))


def test_the_server_shows_the_route_of_its_task() -> None:
    message = ready_message(ServeConfig(model_path="some/model"), PipelineTask.EMBEDDINGS_GENERATION)
    assert "/v1/embeddings" in message
    assert '"input": "Hello!"' in message
