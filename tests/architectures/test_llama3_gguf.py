"""Llama from GGUF files against Hugging Face on the weights that the `gguf` package dequantizes, and served alone."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures.llama3.model import Llama3Model
from architectures.llama3.weight_adapters import gguf_name_map
from max_ray.config import PipelineConfig
from max_ray.distributed import TPGroup
from max_ray.errors import EncodingNotSupportedError, ParallelismError, WeightsError
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import RequestID, SupportedEncoding, TextContext, TextGenerationInputs, TextGenerationRequest
from max_ray.nn.quantized_linear import QuantizedWeight
from max_ray.pipelines import PIPELINE_REGISTRY, resolve_plan
from max_ray.weights import open_weights
from tests.architectures.engine import Engine, random_tokens
from tests.architectures.reference import reference_logits
from tests.checkpoints import load_reference, make_llama
from tests.gguf_files import K_SIZES, make_gguf, reference_folder
from tests.nn.ranks import run_ranks

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TWO_RANKS = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
FILES: dict[str, dict[str, Any]] = {
    "F32": {"types": {}},
    "BF16": {"types": {}, "default": "BF16", "num_key_value_heads": 4},
    "Q4_0": {"types": {}, "default": "Q4_0", **K_SIZES},
    "Q8_0": {"types": {}, "default": "Q8_0", "tie_word_embeddings": True},
    "Q8_0 wide": {"types": {}, "default": "Q8_0", **K_SIZES},
    "Q5_0 mixed": {"types": {"attn_v": "Q8_0", "ffn_down": "Q8_0"}, "default": "Q5_0"},
    "Q6_K": {"types": {}, "default": "Q6_K", **K_SIZES, "rope_parameters": LLAMA3_ROPE},
    "Q4_K mixed": {
        "types": {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K", "blk.0.ffn_up": "F16"},
        "default": "Q4_K",
        **K_SIZES,
        "vocab_size": 277,
    },
    "Q4_K two ranks": {"types": {"attn_v": "Q6_K"}, "default": "Q4_K", **TWO_RANKS},
    "Q5_K mixed": {"types": {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}, "default": "Q5_K", **K_SIZES},
    "Q4_1": {"types": {"attn_v": "Q4_0"}, "default": "Q4_1", **K_SIZES},
    "Q5_K tied": {"types": {}, "default": "Q5_K", **K_SIZES, "tie_word_embeddings": True, "vocab_size": 277},
    "Q5_K two ranks": {"types": {"attn_v": "Q6_K"}, "default": "Q5_K", **TWO_RANKS},
}
# Types that are rounded to another as they are read.
ROUNDED: dict[str, dict[str, Any]] = {
    "Q5_1 mixed": {"types": {"ffn": "Q4_0"}, "default": "Q5_1", **K_SIZES},
}


@dataclass(frozen=True)
class Float32Activations:
    """Stands for a quantized encoding, with activations in float32: errors of the weights' path alone."""

    cache_dtype: str = "float32"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(GGUF file, folder of the same weights in float32) by name, made once."""
    folder = tmp_path_factory.mktemp("gguf")
    known: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in known:
            path = make_gguf(folder / f"{name.replace(' ', '-')}.gguf", **(FILES | ROUNDED)[name])
            known[name] = path, reference_folder(path)
        return known[name]

    return make


def load(path: Path, tp: TPGroup, encoding: Any = Float32Activations()) -> Llama3Model:
    config, source = load_huggingface_config(path), open_weights(path, keep_quantized=True)
    settings = PipelineConfig(model_path=str(path))
    return Llama3Model(settings, config, encoding, tp.device, tp, source, gguf_name_map)


@pytest.mark.parametrize("name", list(FILES))
def test_logits_equal_hugging_face(made: Callable[[str], tuple[Path, Path]], name: str) -> None:
    path, reference = made(name)
    model = load(path, TPGroup.single())
    sequences = random_tokens([17, 5, 1], 272)
    ours = Engine(model).logits_of(sequences, [[9, 8], [5], [1]])
    for mine, theirs in zip(ours, reference_logits(reference, sequences), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    kept = isinstance(model.network.layers[0].mlp.gate_up.weight, QuantizedWeight)
    assert kept == name.startswith("Q")


@pytest.mark.parametrize("name", ["Q4_K mixed", "Q4_0", "Q4_1", "Q8_0 wide", "Q5_K mixed", "Q6_K", *ROUNDED])
def test_bfloat16_activations_stay_close(made: Callable[[str], tuple[Path, Path]], name: str) -> None:
    """Where the processor multiplies bytes, inputs of the layers are rounded to 8 bits besides."""
    path, reference = made(name)
    sequences = random_tokens([40, 17], 272)
    ours = Engine(load(path, TPGroup.single(), SupportedEncoding.q4_k)).logits_of(sequences, [[40], [17]])
    divergences = []
    for mine, theirs in zip(ours, reference_logits(reference, sequences), strict=True):
        exact = theirs.log_softmax(-1)
        divergences.append((exact.exp() * (exact - mine.float().log_softmax(-1))).sum(-1))
    assert 0 < torch.cat(divergences).mean() < 1e-3


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
def test_two_ranks_equal_one(made: Callable[[str], tuple[Path, Path]], kind: str) -> None:
    path, reference = made(f"{kind} two ranks")
    sequences = random_tokens([11], 272)
    expected = reference_logits(reference, sequences)[0]
    for logits in run_ranks(2, lambda tp: Engine(load(path, tp)).logits_of(sequences, [[11]])):
        torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)


def test_a_rank_that_would_cut_through_a_block_is_refused(made: Callable[[str], tuple[Path, Path]]) -> None:
    path = made("Q6_K")[0]
    with pytest.raises(ParallelismError, match=r"attn_output.*blocks of 256 columns"):
        load(path, TPGroup(rank=0, size=2, device=torch.device("cpu")))
    with pytest.raises(ParallelismError, match=r"attn_output.*blocks of 256 columns"):
        resolve_plan(PipelineConfig(model_path=str(path), devices="cpu", tensor_parallel_size=2))
    assert resolve_plan(PipelineConfig(model_path=str(path), devices="cpu")).encoding.value == "q6_k"


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
def test_ranks_that_cut_between_blocks_are_planned(made: Callable[[str], tuple[Path, Path]], kind: str) -> None:
    path = made(f"{kind} two ranks")[0]
    assert (
        resolve_plan(PipelineConfig(model_path=str(path), devices="cpu", tensor_parallel_size=2)).memory.num_ranks == 2
    )


def test_a_lone_file_is_served_with_its_own_tokenizer(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    path, reference = made("Q4_K mixed")
    lone = Path(shutil.copy(path, tmp_path / "alone.gguf"))
    config = PipelineConfig(model_path=str(tmp_path), devices="cpu", num_threads=1)
    assert config.replace(model_path=str(lone)).served_model_name
    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(config)
    request = TextGenerationRequest(
        RequestID(),
        "m",
        messages=[{"role": "user", "content": "Hi"}],
        sampling_params={"max_new_tokens": 6, "temperature": 0.0},
    )
    context = asyncio.run(tokenizer.new_context(request))
    ids = torch.from_numpy(context.tokens.all.copy()).view(1, -1)
    while not context.is_done:
        inputs = TextGenerationInputs[TextContext](batches=[{context.request_id: context}], num_steps=4)
        pipeline.execute(inputs)
    pipeline.release(context.request_id)
    with torch.no_grad():
        logits = load_reference(reference)(torch.from_numpy(context.tokens.all.copy()).view(1, -1)).logits[0]
    generated = context.tokens.all[ids.shape[1] :]
    steps = logits[ids.shape[1] - 1 : -1]
    chosen = steps[torch.arange(len(generated)), torch.from_numpy(generated)]
    assert (steps.max(-1).values - chosen < 0.05).all()  # activations are bfloat16: equal, but for near ties


def test_encodings_are_checked_before_weights_are_read(made: Callable[[str], tuple[Path, Path]]) -> None:
    mixed = PipelineConfig(model_path=str(made("Q4_K mixed")[0]), devices="cpu")
    assert resolve_plan(mixed).encoding.value == "q4_k"
    assert resolve_plan(mixed.replace(model_path=str(made("Q5_K mixed")[0]))).encoding.value == "q5_k"
    assert resolve_plan(mixed.replace(quantization_encoding="bfloat16")).encoding.value == "bfloat16"
    with pytest.raises(EncodingNotSupportedError, match=r"q8_0 needs a checkpoint in that.*in q4_k.*: bfloat16"):
        resolve_plan(mixed.replace(quantization_encoding="q8_0"))


def test_a_file_that_is_no_language_model(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "hf")
    (tmp_path / "fake.gguf").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(WeightsError, match="does not begin with GGUF"):
        resolve_plan(PipelineConfig(model_path=str(tmp_path / "fake.gguf")))
