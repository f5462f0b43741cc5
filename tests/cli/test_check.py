"""`max-ray check`: the example family conforms; one that computes something else, lacks weights or has nothing to be
compared with is told so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from max_ray.cli.main import main
from tests.architectures.families import TinyModel, make_tiny

EXAMPLE = Path(__file__).parents[2] / "deployments" / "examples" / "granite"
GRANITE = TinyModel(
    "Granite",
    "GraniteForCausalLM",
    {
        "head_dim": 8,
        "num_hidden_layers": 2,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "num_attention_heads": 4,
    },
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(GRANITE, tmp_path_factory.mktemp("granite"))


def changed_copy(folder: Path, old: str, new: str) -> Path:
    """The example with one line of its network changed."""
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "granite.py"
    code = file.read_text()
    assert old in code
    file.write_text(code.replace(old, new))
    return folder


def check(family: Path, checkpoint: Path) -> int:
    return main(["check", str(family), "--model-path", str(checkpoint)])


def test_the_example_conforms(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(EXAMPLE, checkpoint) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "GraniteForCausalLM conforms: all 12 cases are within their limits."
    assert lines[1] == "21 tensors, of which the table drops 0."
    assert [line.split()[:3] for line in lines[3:5]] == [["1", "float32", "paged"], ["1", "float32", "chunked"]]
    assert sum(line.endswith("ok") for line in lines) == 12


def test_the_example_is_short() -> None:
    assert sum(len(file.read_text().splitlines()) for file in EXAMPLE.glob("*.py")) < 150


def test_a_wrong_network_is_told_where(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = changed_copy(tmp_path / "wrong", "* self._config.embedding_multiplier", "")
    assert check(family, checkpoint) == 2
    captured = capsys.readouterr()
    assert "differs" in captured.out
    assert "WRONG" in captured.out
    assert "GraniteForCausalLM does not conform: 12 of 12 cases" in captured.err


def test_missing_weights_are_named(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = changed_copy(tmp_path / "more", "bias=config.attention_bias", "bias=True")
    assert check(family, checkpoint) == 2
    assert "lacks 8 tensors (model.layers.0.self_attn.q_proj.bias" in capsys.readouterr().err


def test_ranks_that_the_family_does_not_take_are_left_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = changed_copy(tmp_path / "single", "class GraniteBlock", "class GraniteBlock")
    init = family / "__init__.py"
    init.write_text(init.read_text().replace("multi_gpu_supported=True", "multi_gpu_supported=False"))
    assert check(family, checkpoint) == 0
    out = capsys.readouterr().out
    assert "2 ranks: not run. The record says multi_gpu_supported=False." in out
    assert "all 6 cases" in out


def test_a_checkpoint_of_another_family(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(EXAMPLE, tiny_llama) == 2
    assert "brings GraniteForCausalLM, but config.json says LlamaForCausalLM" in capsys.readouterr().err


def test_a_reference_of_the_familys_own(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where transformers knows no such model; here one whose logits are all equal, which nothing conforms to."""
    family = changed_copy(tmp_path / "own", "class GraniteBlock", "class GraniteBlock")
    init = family / "__init__.py"
    init.write_text(
        init.read_text() + "\n\ndef reference_logits(path, sequences):\n"
        "    return [[[0.0] * 160 for _ in sequence] for sequence in sequences]\n"
    )
    assert check(family, checkpoint) == 2
    assert "12 of 12 cases are outside of their limits" in capsys.readouterr().err


def test_a_model_that_transformers_does_not_know(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint, path)
    config = path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "granite"', '"model_type": "mine"'))
    assert check(EXAMPLE, path) == 2
    assert "bring a function reference_logits(path, sequences)" in capsys.readouterr().err


def test_a_family_by_the_name_that_the_list_has(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "LlamaForCausalLM", "--model-path", str(tiny_llama)]) == 0
    assert "LlamaForCausalLM conforms: all 12 cases" in capsys.readouterr().out
    assert main(["check", "Qwen3ForCausalLM", "--model-path", str(tiny_llama)]) == 2
    assert "The family is Qwen3ForCausalLM, but config.json says LlamaForCausalLM" in capsys.readouterr().err
    assert main(["check", "BertModel", "--model-path", str(tiny_llama)]) == 2
    assert "BertModel is for embeddings_generation" in capsys.readouterr().err


def test_the_adapter_by_its_name(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It covers what transformers has, whatever the name in config.json."""
    assert main(["check", "TransformersForCausalLM", "--model-path", str(checkpoint)]) == 0
    assert "TransformersForCausalLM conforms: all 12 cases" in capsys.readouterr().out


def test_the_reference_stands_beside_the_list(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the network is another package's, and where the list is in a module of a package."""
    package = tmp_path / "families_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "families.py").write_text(
        "from architectures.llama3 import llama_arch\n\nMINE = [llama_arch]\n\n\n"
        "def reference_logits(path, sequences):\n    return [[0.0] * 272 for _ in sequences]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["check", "families_of_mine.families:MINE", "--model-path", str(tiny_llama)]) == 2
    error = capsys.readouterr().err
    assert "reference_logits of families_of_mine.families:MINE must give logits [length, vocabulary]" in error


def test_a_damaged_checkpoint_is_said_before_the_reference_reads_it(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_llama, path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert main(["check", "LlamaForCausalLM", "--model-path", str(path)]) == 2
    assert "model.safetensors is truncated or corrupt" in capsys.readouterr().err
