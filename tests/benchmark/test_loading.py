from __future__ import annotations

from pathlib import Path

import pytest
import torch

from max_ray.benchmark import loading
from tests.checkpoints import make_llama
from tests.gguf_files import K_SIZES, make_gguf


def rows(model: Path, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    loading.main([str(model), "--runs", "2"])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{model}: 0.0")
    return [line.split() for line in lines]


def test_a_folder_and_a_quantized_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        plain = rows(make_llama(tmp_path / "plain", vocab_size=20000, hidden_size=64, dtype=torch.bfloat16), capsys)
        assert all(len(row) == 7 and float(row[1]) > 0 and float(row[2]) > 0 for row in plain)
        quantized = rows(make_gguf(tmp_path / "q.gguf", {}, default="Q4_K", **K_SIZES), capsys)
        assert [row[0] for row in quantized] == ["0", "1"]
        assert {tuple(row[2:4]) for row in quantized} == {("-", "-")}
    finally:
        torch.set_num_threads(threads)


def test_bytes_a_second_count_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(3 << 20))
    (tmp_path / "b").write_bytes(bytes(5))
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(loading.time, "perf_counter", lambda: next(clock))
    assert loading.read_files([tmp_path / "a", tmp_path / "b"]) == ((3 << 20) + 5) / 2
