"""`max-ray benchmark kernels` and `offline` on a CPU with the smallest shape: they run, count right, notice errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from max_ray.benchmark import kernel_cases, kernels, offline
from max_ray.benchmark.shapes import SHAPES, load_shape
from max_ray.benchmark.synthetic import build_runner, run_request
from max_ray.benchmark.timing import Machine
from max_ray.errors import ConfigError

CPU = torch.device("cpu")
MACHINE = Machine("test", torch.__version__, copy_bytes_per_s=1e9, matmul_flops_per_s=1e10)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(Machine, "measure", lambda device, dtype: MACHINE)


def test_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "seconds", lambda run, device: 1e-3)
    file = tmp_path / "kernels.json"
    assert kernels.main(["--tokens", "5", "--context", "32", "--rows", "1,3", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    names = [result["kernel"] for result in report["kernels"]]
    assert {name.split()[0] for name in names} >= {"rope_and_append", "silu_and_mul", "attention", "sampling"}
    assert {"linear (q4_k) 1", "linear (q8_0) 16", "linear (fp8) 64", "linear (q5_k) 5"} <= set(names)
    linear = next(r for r in report["kernels"] if r["kernel"] == "linear (q8_0) 16")
    assert linear["bytes"] == 256 * 256 * 17 // 16 + 2 * 16 * (256 + 256)
    assert linear["flops"] == 2 * 16 * 256 * 256
    assert all(result["agrees"] for result in report["kernels"])
    activation = next(r for r in report["kernels"] if r["kernel"] == "silu_and_mul 5")
    assert activation["bytes"] == 5 * 128 * 3 * 2
    assert activation["share_of_copy"] == pytest.approx(activation["bytes"] / 1e-3 / 1e9)
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_a_kernel_that_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "seconds", lambda run, device: 1e-3)
    monkeypatch.setattr(kernel_cases.kernels, "silu_and_mul", lambda x: x[:, : x.shape[1] // 2] * 0.9)
    assert kernels.main(["--tokens", "5", "--context", "32", "--rows", "1"]) == 2
    captured = capsys.readouterr()
    assert "WRONG" in captured.out
    assert "silu_and_mul 5" in captured.err


def test_attention_work_by_counting_pairs() -> None:
    sizes = kernel_cases.Sizes.of(SHAPES["tiny"], tokens=4, context=64, rows=[1])
    case = kernel_cases.CaseFactory(sizes, CPU, torch.float32).attention([(3, 2), (0, 4)], sliding_window=3)
    visible = sum(min(position + 1, 3) for position in (3, 4, 0, 1, 2, 3))
    assert case.flops == 4 * visible * sizes.heads * sizes.head_dim
    read = 4 + 4  # of 5 and of 4 keys, those that some query sees
    assert case.nbytes == 4 * (2 * 6 * sizes.heads * sizes.head_dim + 2 * read * sizes.kv_heads * sizes.head_dim)
    assert case.error(case.run(), case.reference()) < 1e-6


def test_latent_attention_work_by_counting_pairs() -> None:
    sizes = kernel_cases.Sizes.of(SHAPES["tiny"], tokens=4, context=64, rows=[1])
    case = kernel_cases.CaseFactory(sizes, CPU, torch.float32).latent_attention([(3, 2), (0, 4)])
    heads, head_dim = sizes.heads, sizes.head_dim
    latent, rope = 4 * head_dim, head_dim // 2
    visible = 4 + 5 + 1 + 2 + 3 + 4
    absorbing = 6 * 2 * head_dim * latent
    assert case.flops == 2 * heads * (visible * (2 * latent + rope) + absorbing)
    queries_and_results = 6 * heads * (2 * head_dim + rope)
    assert case.nbytes == 4 * (queries_and_results + heads * 2 * head_dim * latent + 9 * (latent + rope))
    assert case.error(case.run(), case.reference()) < 1e-6


@pytest.mark.parametrize(("actual", "expected"), [([1.0, 2.0], 0.0), ([1.0, 2.1], 0.0447), ([1.0, float("nan")], None)])
def test_relative_error(actual: list[float], expected: float | None) -> None:
    error = kernel_cases.relative_error(torch.tensor(actual), torch.tensor([1.0, 2.0]))
    assert error == (float("inf") if expected is None else pytest.approx(expected, abs=1e-3))


def test_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "offline.json"
    sizes = ["--batches", "1,3", "--context", "20", "--steps", "2", "--prompt", "30"]
    assert offline.main([*sizes, "--dtype", "float32", "--json", str(file)]) == 0
    results = {result["case"]: result for result in json.loads(file.read_text())["results"]}
    assert list(results) == ["decode, batch 1", "decode, batch 3", "prefill, 30 tokens"]
    for result in results.values():
        assert result["tokens_per_s"] == pytest.approx(result["tokens"] / result["seconds"])
        assert result["transformers_tokens_per_s"] > 0
    assert "decode, batch 3" in capsys.readouterr().out


def test_the_peer_stops_when_its_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batches", "1", "--context", "8", "--steps", "1", "--prompt", "8", "--peer-budget", "1e-9"]
    assert offline.main(flags) == 0
    assert capsys.readouterr().out.count("not measured") == 2


def test_the_work_of_a_step() -> None:
    """The tiny shape counted by hand: 64 wide, 2 layers of 4 heads on 2 key heads of 16, 128 inside, 272 tokens."""
    work = offline.Work.of(SHAPES["tiny"], torch.bfloat16)
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert (work.body, work.head) == (2 * layer + 64, 272 * 64)
    assert work.kv_bytes == 2 * 2 * 2 * 16 * 2
    assert work.attention_flops == 4 * 2 * 64
    nbytes = (work.body + work.head) * 2 + 3 * 10 * work.kv_bytes
    assert work.decode_floor_s(MACHINE, 3, 10) == pytest.approx(nbytes / 1e9)


def test_eight_billion_parameters() -> None:
    work = offline.Work.of(SHAPES["llama-8b"], torch.bfloat16)
    assert work.body + work.head == 8_030_261_248 - 128_256 * 4096
    tied = offline.Work.of(SHAPES["llama-1b"], torch.bfloat16)
    assert tied.body + tied.head == 1_235_814_400


def test_the_runner_of_random_weights_is_the_products() -> None:
    sizes = {"max_rows": 3, "max_length": 64, "num_blocks": 12}
    runner = build_runner(SHAPES["tiny"], "architectures.llama3", torch.float32, CPU, **sizes)

    def tokens(rows: int, cached: int, new: int, steps: int) -> list[list[int]]:
        request = run_request(rows, cached, new, steps, 272)
        return [step.tokens.tolist() for step in runner.run(request)]

    steps = tokens(3, 0, 20, 5)
    assert len(steps) == 5
    assert all(0 <= token < 272 for step in steps for token in step)
    assert tokens(3, 0, 20, 5) == steps, "the same request, the same tokens"
    assert len(tokens(1, 30, 1, 4)) == 4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--shape", "llama-8"], "Did you mean 'llama-8b'?"),
        (["--batches", "1,x"], "positive numbers"),
        (["--steps", "0"], "--steps should be positive"),
        (["--peer", "vllm"], "the peers are"),
        (["--dtype", "int8"], "use bfloat16"),
        (["--device", "cuda"], "--device cpu"),
    ],
)
def test_mistakes_are_one_sentence(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    if flags[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert offline.main(flags) == 2
    assert sentence in capsys.readouterr().err


def test_shapes_from_files(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    values: dict[str, Any] = SHAPES["tiny"] | {"hidden_size": 32}
    file.write_text(json.dumps(values))
    assert load_shape(str(file)) == values
    file.write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        load_shape(str(file))
    file.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_shape(str(file))
