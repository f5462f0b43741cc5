"""`max-ray batch`: the same answers as the pipeline's own, errors as lines, and going on with what was begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from max_ray.cli import main as cli
from max_ray.cli.generate import generated_text
from max_ray.config import PipelineConfig
from max_ray.interfaces import PipelineTask, RequestID, TextGenerationRequest
from max_ray.pipelines import PIPELINE_REGISTRY
from tests.checkpoints import make_llama
from tests.http.batch_servers import jsonl, line, parsed


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "tiny", hidden_size=16)


COMPLETIONS = "/v1/completions"


def run(capsys: pytest.CaptureFixture[str], model: Path, source: Path, target: Path, *options: str) -> tuple[int, str]:
    settings = ("--model-path", str(model), "--served-model-name", "tiny", "--quantization-encoding", "float32")
    code = cli.main(["batch", str(source), str(target), *settings, *options])
    return code, capsys.readouterr().err


def greedy(i: int, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": f"abc {i}" * (i % 5 + 1), "max_tokens": 8, "temperature": 0, **fields}
    return line(f"id-{i}", body, COMPLETIONS)


def alone(model: Path, request: dict[str, Any]) -> str:
    config = PipelineConfig(model_path=str(model), quantization_encoding="float32", served_model_name="tiny")
    prompt = request["body"]["prompt"]
    sampling = {"temperature": 0.0, "max_new_tokens": 8}
    text = TextGenerationRequest(RequestID(), "tiny", prompt=prompt, sampling_params=sampling)
    return "".join(generated_text(*PIPELINE_REGISTRY.retrieve(config, PipelineTask.TEXT_GENERATION), text))


@pytest.mark.parametrize("ranks", [1, 2])
def test_answers_are_those_of_the_pipeline(
    capsys: pytest.CaptureFixture[str], model_path: Path, tmp_path: Path, ranks: int
) -> None:
    requests = [greedy(i) for i in range(12)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(requests))
    code, told = run(capsys, model_path, source, target, "--tensor-parallel-size", str(ranks))
    assert (code, "12 requests, 0 of this run failed" in told) == (0, True)
    results = {one["custom_id"]: one for one in parsed(target.read_bytes())}
    assert results.keys() == {one["custom_id"] for one in requests}
    for request in requests[:5]:
        body = results[request["custom_id"]]["response"]["body"]
        assert body["choices"][0]["text"] == alone(model_path, request)
        assert body["usage"]["completion_tokens"] == 8


def test_errors_are_lines(capsys: pytest.CaptureFixture[str], model_path: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = [
        b"{\n\n",
        jsonl([greedy(1, top_p=9.0)]),
        jsonl([line("url", {}, "/v1/models")]),
        jsonl([line("vectors", {"input": "a"}, "/v1/embeddings")]),
        jsonl([greedy(2, stream=True)]),
        jsonl([greedy(3)]),
    ]
    source.write_bytes(b"".join(bad))
    code, told = run(capsys, model_path, source, target)
    assert (code, "6 requests, 5 of this run failed" in told) == (0, True)
    results = {one["custom_id"]: one for one in parsed(target.read_bytes())}
    assert "JSON" in results["line 1"]["error"]["message"]
    assert results["id-1"]["response"]["status_code"] == 400
    assert "url" in results["url"]["error"]["message"]
    assert "/v1/chat/completions" in results["vectors"]["response"]["body"]["error"]["message"]
    assert "stream" in results["id-2"]["error"]["message"]
    assert results["id-3"]["response"]["status_code"] == 200


def test_what_was_begun_is_gone_on_with(capsys: pytest.CaptureFixture[str], model_path: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"[]\n" + jsonl([greedy(i) for i in range(6)]))
    kept = jsonl([{"custom_id": "id-2", "response": "of the first run"}, {"custom_id": "line 1", "response": None}])
    target.write_bytes(kept + b'{"custom_id": "id-3", "respo')
    assert run(capsys, model_path, source, target)[0] == 0
    written = target.read_bytes()
    assert written.startswith(kept)
    names = [one["custom_id"] for one in parsed(written)]
    assert sorted(names) == sorted(["line 1", *(f"id-{i}" for i in range(6))])
    assert run(capsys, model_path, source, target)[0] == 0
    assert target.read_bytes() == written


@pytest.mark.parametrize(
    ("content", "output", "word"),
    [
        (None, b"", "No such file"),
        (jsonl([greedy(1), greedy(1)]), b"", "two lines"),
        (jsonl([greedy(1)]), b"{}\n", "no result of a batch"),
    ],
)
def test_files_that_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, output: bytes, word: str
) -> None:
    """Before a model is looked for."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    if content is not None:
        source.write_bytes(content)
    target.write_bytes(output)
    code, told = run(capsys, tmp_path / "no-model", source, target)
    assert (code, word in told) == (2, True), told
    assert target.read_bytes() == output


def test_the_two_files_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl([greedy(1)]))
    code, told = run(capsys, tmp_path / "no-model", source, source)
    assert (code, "same file" in told) == (2, True)
