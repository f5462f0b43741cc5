"""Families other than Llama from GGUF files, laid out as llama.cpp's converter does it, against Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type

from max_ray.config import PipelineConfig
from max_ray.conformance.engine import random_tokens
from max_ray.conformance.reference import huggingface_reference
from max_ray.errors import WeightsError
from max_ray.pipelines import resolve_plan
from max_ray.weights import open_weights
from tests.gguf_families import KINDS, convert, logits_of, tiny

_NAMES = [name for name in KINDS if name not in ("Llama 3", "Mistral")]


@pytest.mark.parametrize("name", _NAMES)
def test_logits_equal_hugging_face(name: str, tmp_path: Path) -> None:
    folder = tiny(name, tmp_path / "hf")
    sequences = random_tokens([19, 6], 160)
    convert(name, folder, tmp_path / "f32.gguf")
    ours = logits_of(tmp_path / "f32.gguf", sequences)
    for mine, theirs in zip(ours, huggingface_reference(folder)(sequences), strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-4 if "DeepSeek" in name else 2e-4, rtol=0)


@pytest.mark.parametrize("name", [pytest.param("DeepSeek V2 Lite", marks=pytest.mark.slow), "DeepSeek V3"])
def test_older_files_of_latent_attention(name: str, tmp_path: Path) -> None:
    """The up-projection whole, and keys and values as long as a head's."""
    folder, sequences = tiny(name, tmp_path / "hf"), random_tokens([40], 160)
    older = {"attention.key_length": 40, "attention.value_length": 16, "attention.head_count_kv": 4}
    older |= {"attention.key_length_mla": None, "attention.value_length_mla": None}
    convert(name, folder, tmp_path / "f32.gguf", keys=older, halves=False)
    ours = logits_of(tmp_path / "f32.gguf", sequences)[0]
    torch.testing.assert_close(ours, huggingface_reference(folder)(sequences)[0], atol=5e-4, rtol=0)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    folder, sequences = tiny("DeepSeek V3", tmp_path / "hf"), random_tokens([20], 160)
    whole = convert("DeepSeek V3", folder, tmp_path / "whole.gguf", keys={"nextn_predict_layers": 1})
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_plan(PipelineConfig(model_path=str(whole), devices="cpu")).huggingface_config.num_hidden_layers == 2
    torch.testing.assert_close(
        logits_of(whole, sequences)[0], huggingface_reference(folder)(sequences)[0], atol=5e-4, rtol=0
    )


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    """Experts in MXFP4, read as numbers: what the `gguf` package makes of them, fused and transposed."""
    path = convert("gpt-oss", tiny("gpt-oss", tmp_path / "hf"), tmp_path / "mxfp4.gguf", "MXFP4")
    assert resolve_plan(PipelineConfig(model_path=str(path), devices="cpu")).encoding.value == "bfloat16"
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    gate, up = (
        torch.tensor(gguf.quants.dequantize(stored[f"blk.1.ffn_{which}_exps.weight"].data, Type.MXFP4))
        for which in ("gate", "up")
    )  # [E, F, D] each
    source, name = open_weights(path), "blk.1.ffn_gate_up_exps.weight"
    whole = source.get(name)
    assert tuple(whole.shape) == source.shape(name) == (6, 64, 2 * 96)
    assert torch.equal(whole[..., ::2], gate.transpose(1, 2))
    assert torch.equal(whole[..., 1::2], up.transpose(1, 2))
    for axis, start, stop in ((0, 2, 5), (1, 3, 40), (2, 96, 192), (2, 5, 10)):
        assert torch.equal(source.get_slice(name, axis, start, stop), whole.narrow(axis, start, stop - start))
    bias = source.get("blk.1.ffn_gate_up_exps.bias")
    assert torch.equal(source.get_slice("blk.1.ffn_gate_up_exps.bias", 1, 4, 9), bias[:, 4:9])


def test_a_rank_reads_the_heads_that_it_has(tmp_path: Path) -> None:
    path = convert("DeepSeek V3", tiny("DeepSeek V3", tmp_path / "hf"), tmp_path / "q.gguf", "Q8_0")
    source, name = open_weights(path), "blk.1.attn_kv_b.weight"
    whole = source.get(name)
    assert tuple(whole.shape) == source.shape(name) == (4 * (32 + 16), 32)
    for start, stop in ((0, 96), (96, 192), (30, 131), (7, 7)):
        assert torch.equal(source.get_slice(name, 0, start, stop), whole[start:stop])
    assert torch.equal(source.get_slice(name, 1, 3, 9), whole[:, 3:9])
    wrong = convert("DeepSeek V3", tmp_path / "hf", tmp_path / "w.gguf", keys={"attention.head_count": 3})
    with pytest.raises(WeightsError, match=r"attn_k_b\.weight and attn_v_b\.weight have .* for 3 heads"):
        open_weights(wrong)


@pytest.mark.parametrize("name", _NAMES)
def test_quantized_weights_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    convert(name, tiny(name, tmp_path / "hf"), tmp_path / "q.gguf", "Q8_0")
    sequences = random_tokens([19], 160)
    kept = logits_of(tmp_path / "q.gguf", sequences)[0]
    torch.testing.assert_close(
        kept, logits_of(tmp_path / "q.gguf", sequences, keep_quantized=False)[0], atol=2e-4, rtol=0
    )
