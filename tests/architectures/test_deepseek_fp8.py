"""DeepSeek V3 as it is published: matrices in float8 with a scale for each block of 128 x 128, against Hugging Face on
the dequantized weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from max_ray.config import PipelineConfig
from max_ray.conformance.engine import Engine, random_tokens
from max_ray.conformance.reference import huggingface_reference
from max_ray.distributed import TPGroup
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import SupportedEncoding, WeightsFormat
from max_ray.nn.quantized_linear import QuantizedWeight
from max_ray.pipelines import resolve_plan
from max_ray.planning.checkpoint import open_checkpoint
from max_ray.registry import PIPELINE_REGISTRY
from tests.architectures.families import find_tiny, make_tiny
from tests.architectures.test_llama3_quantized import fp8

WIDE = {
    **{"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2},
    **{"kv_lora_rank": 128, "q_lora_rank": 128, "v_head_dim": 32, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
}


def make_fp8(folder: Path) -> tuple[Path, Path]:
    """(the checkpoint in float8, the same weights in float32)."""
    model = find_tiny("DeepSeek V3")
    plain = make_tiny(replace(model, overrides={**model.overrides, **WIDE}), folder / "plain")
    tensors, meant = {}, {}
    for name, data in load_file(plain / "model.safetensors").items():
        is_matrix = ".layers." in name and data.dim() == 2 and not name.endswith("mlp.gate.weight")
        stored, meant[name] = fp8("block", data) if is_matrix else ({"weight": data}, data)
        stem = name.removesuffix("weight") if is_matrix else name
        tensors |= {f"{stem}{kind}" if is_matrix else name: value for kind, value in stored.items()}
    quantized = folder / "fp8"
    quantized.mkdir()
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (quantized / "config.json").write_text(json.dumps(config))
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    return quantized, plain


def test_blocks_of_float8(tmp_path: Path) -> None:
    quantized, plain = make_fp8(tmp_path)
    settings = PipelineConfig(model_path=str(quantized), devices="cpu")
    assert resolve_plan(settings).encoding is SupportedEncoding.float8_e4m3fn
    config = load_huggingface_config(quantized)
    record: Any = PIPELINE_REGISTRY.retrieve_architecture(config)
    source = open_checkpoint(quantized, WeightsFormat.safetensors, config, SupportedEncoding.float8_e4m3fn)
    tp, adapter = TPGroup.single(), record.weight_adapters[WeightsFormat.safetensors]

    class Float32Activations:
        cache_dtype = "float32"

    model = record.pipeline_model(settings, config, Float32Activations(), tp.device, tp, source, adapter)
    kept = [m for _, m in model.network.named_modules() if isinstance(m, QuantizedWeight)]
    assert len(kept) > 10
    sequences = random_tokens([13, 4], 160)
    ours = Engine(model).logits_of(sequences, [[13], [4]])
    for mine, theirs in zip(ours, huggingface_reference(plain)(sequences), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)
