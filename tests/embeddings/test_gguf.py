"""Encoders and embedders from GGUF files: the vectors of the folder that the file was made from, to the bit."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np
import pytest

from max_ray.config import PipelineConfig
from max_ray.errors import ConfigError, WeightsError
from max_ray.interfaces import PipelineTask
from max_ray.planning.plan import resolve_plan
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.embeddings.checkpoints import make_encoder, random_rows
from tests.embeddings.gguf_encoders import KINDS, convert, write_wordpiece
from tests.embeddings.in_process import embed_in_process, register_families

TEXTS = ["the unaffable Caf\u00e9, worlds!", "a", "\u4e16\u754c e\u0301\u00c9 [MASK] zzz\u03b1", "THE the  Tab\there"]
POOLING = {"bert": "mean", "bert one type, tanh": "cls", "modern_bert": "cls", "qwen3": "lasttoken"}


@pytest.fixture(autouse=True)
def _families() -> None:
    register_families()


@pytest.mark.parametrize("name", KINDS)
def test_the_vectors_of_a_file_are_those_of_its_folder(name: str, tmp_path: Path) -> None:
    pooling = POOLING.get(name, "lasttoken")
    folder = make_encoder(tmp_path / "model", name, pooling=pooling)
    path = convert(folder, tmp_path / "model.gguf", name, pooling)
    for inputs in (TEXTS, random_rows([7, 1, 16, 7, 40], seed=2)):
        ours = embed_in_process(path, inputs)
        assert np.array_equal(ours, embed_in_process(folder, inputs))
        assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_two_ranks(name: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", name, pooling=POOLING[name])
    path = convert(folder, tmp_path / "model.gguf", name, POOLING[name])
    expected = embed_in_process(folder, TEXTS, tensor_parallel_size=2)
    assert np.array_equal(embed_in_process(path, TEXTS, tensor_parallel_size=2), expected)


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece(lowercase: bool, tmp_path: Path) -> None:
    """Whether text is put into lower case is not in the file: the pieces tell."""
    folder = make_encoder(tmp_path / "model", "bert")
    write_wordpiece(folder, lowercase=lowercase)
    path = convert(folder, tmp_path / "model.gguf", "bert", "mean")
    theirs, ours = TextTokenizer(folder, max_length=64), TextTokenizer(path, max_length=64)
    generator = random.Random(4)
    letters = "abceglnorsuwABCE\u00c9\u00e9\u0301 ,!\t\n##\u4e16\u03b1_'0"
    texts = ["".join(generator.choices(letters, k=generator.randrange(30))) for _ in range(500)]
    for text in [*TEXTS, "", "[CLS] in a text", "a" * 101, *texts]:
        ids = theirs.encode_text(text).tolist()
        assert ours.encode_text(text).tolist() == ids, text
        assert ours.decode_ids(ids, True) == theirs.decode_ids(ids, True), text
    assert (theirs.encode_text("CAFE").tolist() == theirs.encode_text("cafe").tolist()) is lowercase
    assert np.array_equal(embed_in_process(path, TEXTS), embed_in_process(folder, TEXTS))


@pytest.mark.parametrize(("pooling", "task"), [("lasttoken", "embeddings_generation"), (None, "text_generation")])
def test_a_pooling_makes_a_decoder_an_embedder(pooling: str | None, task: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "qwen3")
    path = convert(folder, tmp_path / "model.gguf", "qwen3", pooling)
    plan = resolve_plan(PipelineConfig(model_path=str(path), quantization_encoding="float32"))
    assert plan.task is PipelineTask(task)


def test_without_a_pooling_an_encoder_has_its_familys(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "modern_bert", pooling="cls")
    path = convert(folder, tmp_path / "model.gguf", "modern_bert", None)
    assert np.array_equal(embed_in_process(path, TEXTS), embed_in_process(folder, TEXTS))


def test_layers_by_flags(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "modern_bert", pooling="cls")
    flags = {"attention.sliding_window_pattern": [False, True, True, False, True]}
    path = convert(folder, tmp_path / "flags.gguf", "modern_bert", "cls", **flags)
    expected, rows = embed_in_process(folder, TEXTS), random_rows([60])
    assert np.array_equal(embed_in_process(path, TEXTS), expected)
    whole = convert(folder, tmp_path / "whole.gguf", "modern_bert", "cls", **{"attention.sliding_window": None})
    assert not np.array_equal(embed_in_process(whole, rows), embed_in_process(folder, rows))


def test_quantized_files_run_dequantized(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "bert", intermediate_size=64)
    path = convert(folder, tmp_path / "model.gguf", "bert", "mean", kind="Q8_0")
    ours, exact = embed_in_process(path, TEXTS), embed_in_process(folder, TEXTS)
    assert (ours * exact).sum(1).min() > 0.999
    with pytest.raises(ConfigError, match="Set --quantization-encoding to one of bfloat16, float16, float32"):
        embed_in_process(path, TEXTS, quantization_encoding=None)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_decoder_stays_quantized(kind: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "qwen3", pooling="lasttoken", hidden_size=64, intermediate_size=128)
    path = convert(folder, tmp_path / "model.gguf", "qwen3", "lasttoken", kind=kind)
    assert resolve_plan(PipelineConfig(model_path=str(path))).encoding.value == kind.lower()
    rows = random_rows([7, 1, 16, 40], seed=2)
    together = embed_in_process(path, rows, quantization_encoding=None)
    alone = [embed_in_process(path, [row], quantization_encoding=None) for row in rows]
    assert np.array_equal(together, np.concatenate(alone))
    assert (together * embed_in_process(path, rows)).sum(1).min() > 0.9995


@pytest.mark.parametrize(
    ("name", "keys", "sentence"),
    [
        ("bert", {"attention.causal": True}, r"bert.attention.causal must be 0"),
        ("bert", {"pooling_type": 4}, "Scores .* need the model's safetensors"),
        ("modern_bert", {"rope.scaling.type": "linear"}, "rope.scaling.type must be none"),
        ("modern_bert", {"rope.scaling.factor": 4.0}, "changes what the model computes"),
        ("modern_bert", {"attention.sliding_window_pattern": [True]}, "a flag for each of 5 layers"),
        ("bert", {"hidden_activation": "mish"}, "activation 'mish' is not supported"),
    ],
)
def test_what_is_refused(name: str, keys: dict[str, object], sentence: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", name)
    path = convert(folder, tmp_path / "model.gguf", name, "mean", **keys)
    with pytest.raises((ConfigError, WeightsError), match=sentence):
        embed_in_process(path, TEXTS)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "bert")
    path = convert(folder, tmp_path / "model.gguf", "bert", "mean")
    field = gguf.GGUFReader(path).fields["tokenizer.ggml.model"]
    data = bytearray(path.read_bytes())
    at = data.index(b"gpt2", data.index(field.name.encode()))
    data[at : at + 4] = b"t5xx"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="'t5xx' cannot be read; gpt2, llama and bert can"):
        embed_in_process(path, TEXTS)
