"""Settings of quantized checkpoints as tools write them: beside config.json, for some layers, of AutoRound, of 8 bits
and of whole rows; against Hugging Face on what the tensors mean by the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from max_ray.config import PipelineConfig
from max_ray.distributed import TPGroup
from max_ray.errors import ConfigError, WeightsError
from max_ray.interfaces import SupportedEncoding
from max_ray.nn.quantized_linear import QuantizedWeight
from max_ray.pipelines import resolve_plan
from tests.architectures.engine import Engine, random_tokens
from tests.architectures.reference import reference_logits
from tests.architectures.test_llama3_quantized import (
    AWQ_ORDER,
    Made,
    change_tensors,
    fp8,
    integers,
    load,
    make_fp8_as,
    make_named,
    pack_nibbles,
)
from tests.held_weights import held_weights
from tests.nn.ranks import run_ranks

Layer = tuple[dict[str, torch.Tensor], torch.Tensor]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[a, c b] -> int32 [a, b], lowest bits first, c = 32 / bits codes in each."""
    split = codes.long().reshape(codes.shape[0], -1, 32 // bits)
    packed = (split << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def gptq(tensor: torch.Tensor, bits: int, size: int, offset: int = 1, order: bool = False, awq: bool = False) -> Layer:
    """The tensors of one layer, and the matrix [N, K] that they mean. size: -1 for one group of all columns. offset: by
    how much less than the zero is stored."""
    num_rows, num_columns = tensor.shape
    generator = torch.Generator().manual_seed(num_rows + num_columns)
    size = num_columns if size == -1 else size
    shape = (num_columns // size, num_rows)
    codes = torch.randint(0, 1 << bits, (num_columns, num_rows), generator=generator)
    zeros = torch.full(shape, 128) if bits == 8 else torch.randint(1, 16, shape, generator=generator)
    scales = (torch.rand(shape, generator=generator) * 0.5 / (1 << bits)).half()
    groups = torch.arange(num_columns) // size
    groups = groups[torch.randperm(num_columns, generator=generator)] if order else groups
    meant = ((codes - zeros[groups]) * scales.float()[groups]).t().contiguous()
    if awq:
        packed = {"qweight": pack_nibbles(codes, AWQ_ORDER), "qzeros": pack_nibbles(zeros, AWQ_ORDER)}
        return {**packed, "scales": scales}, meant
    return {
        "qweight": pack_words(codes.t(), bits).t().contiguous(),
        "qzeros": pack_words((zeros - offset) % (1 << bits), bits),
        "scales": scales,
        "g_idx": groups.to(torch.int32),
    }, meant


def beside(made: Made, file: str, content: dict[str, Any]) -> Made:
    """Takes the settings out of config.json, and puts `content` beside it."""
    config = json.loads((made[0] / "config.json").read_text())
    del config["quantization_config"]
    (made[0] / "config.json").write_text(json.dumps(config))
    (made[0] / file).write_text(json.dumps(content))
    return made


def renamed(made: Made, key: str) -> Made:
    config = json.loads((made[0] / "config.json").read_text())
    config[key] = config.pop("quantization_config")
    (made[0] / "config.json").write_text(json.dumps(config))
    return made


def modelopt(folder: Path, **more: Any) -> Made:
    content = {
        "producer": {"name": "modelopt", "version": "0.19.0"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"], **more},
    }
    return beside(make_fp8_as(folder, {"quant_method": "modelopt"}, "tensor"), "hf_quant_config.json", content)


def mixed(folder: Path, others: dict[str, Any], other: Callable[[torch.Tensor], Layer]) -> Made:
    """FP8 in the attention layers, k_proj plain, `others` in the rest but one layer, which is FP8 by its name."""
    named = "model.layers.0.mlp.up_proj"

    def layer(name: str, tensor: torch.Tensor) -> Layer:
        if "k_proj" in name:
            return {"weight": tensor}, tensor
        return fp8("channel", tensor) if "self_attn" in name or named in name else other(tensor)

    groups = {
        "group_0": {"targets": ["Linear"], "weights": others, "format": "pack-quantized"},
        "group_1": {"targets": ["re:.*self_attn.*", named], "weights": FLOAT, "format": "float-quantized"},
    }
    ignored = ["lm_head", "re:.*k_proj"]
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ignored}
    return make_named(folder, {**settings, "config_groups": groups}, layer)


def packed(bits: int, size: int) -> Callable[[torch.Tensor], Layer]:
    generator = torch.Generator().manual_seed(9)
    return lambda tensor: integers(bits, size, False, False, generator, (tensor.shape[0], tensor.shape[1]))


def auto_round(folder: Path, packing: str, **extra: Any) -> Made:
    """4 bits but for down_proj, which has 8 (GPTQ's packing alone), and k_proj, which is plain."""
    awq = "awq" in packing
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "packing_format": packing}
    more = {"model.layers.0.self_attn.k_proj": {"bits": 16, "data_type": "fp"}}
    if not awq:
        more["model.*mlp.down_pr[a-z]j"] = {"bits": 8, "group_size": 64}

    def layer(name: str, tensor: torch.Tensor) -> Layer:
        if "k_proj" in name:
            return {"weight": tensor}, tensor
        is_wide = not awq and "down_proj" in name
        return gptq(tensor, 8, 64) if is_wide else gptq(tensor, 4, 32, awq=awq)

    return make_named(folder, {**settings, "extra_config": more, **extra}, layer)


def dynamic(folder: Path) -> Made:
    """GPTQModel's settings by pattern: 8 bits of whole rows in down_proj, k_proj plain."""
    patterns = {"-:.*k_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": -1}, ".*": {"group_size": 64}}

    def layer(name: str, tensor: torch.Tensor) -> Layer:
        if "k_proj" in name:
            return {"weight": tensor}, tensor
        return gptq(tensor, 8, -1) if "down_proj" in name else gptq(tensor, 4, 64)

    return make_named(folder, {**GPTQ, "dynamic": patterns}, layer)


def plain_gptq(folder: Path, bits: int, size: int, order: bool = False, **settings: Any) -> Made:
    offset = 0 if "gptq_v2" in settings.values() else 1
    settings = {**GPTQ, "bits": bits, "group_size": size, "desc_act": order, **settings}
    return make_named(folder, settings, lambda _, tensor: gptq(tensor, bits, size, offset, order))


OLD_GPTQ = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
OLD_AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}
CASES: dict[str, Callable[[Path], Made]] = {
    "hf_quant_config.json": modelopt,
    "quantize_config.json": lambda folder: beside(plain_gptq(folder, 4, 32), "quantize_config.json", OLD_GPTQ),
    "quant_config.json": lambda folder: beside(
        make_named(folder, AWQ, lambda _, tensor: gptq(tensor, 4, 32, awq=True)), "quant_config.json", OLD_AWQ
    ),
    "compression_config": lambda folder: renamed(mixed(folder, INT4, packed(4, 32)), "compression_config"),
    "8 bits": lambda folder: plain_gptq(folder, 8, 64),
    "8 bits, act-order": lambda folder: plain_gptq(folder, 8, 32, order=True),
    "8 bits, version 2": lambda folder: plain_gptq(folder, 8, 128, format="gptq_v2"),
    "8 bits, whole rows": lambda folder: plain_gptq(folder, 8, -1),
    "whole rows": lambda folder: plain_gptq(folder, 4, -1),
    "whole rows, said to be in act-order": lambda folder: plain_gptq(folder, 4, -1, order=True),
    "awq, whole rows": lambda folder: make_named(
        folder, {**AWQ, "group_size": -1}, lambda _, tensor: gptq(tensor, 4, -1, awq=True)
    ),
    "mixed with 4 bits": lambda folder: mixed(folder, INT4, packed(4, 32)),
    "mixed with 8 bits": lambda folder: mixed(folder, INT8, packed(8, 0)),
    "auto-round": lambda folder: auto_round(folder, "auto_round:auto_gptq"),
    "auto-round as awq": lambda folder: auto_round(folder, "auto_round:auto_awq"),
    "auto-round by its older name": lambda folder: auto_round(folder, "", backend="auto_round:gptq:exllamav2"),
    "dynamic": dynamic,
}


_REPEATED = (
    *("compression_config", "8 bits", "whole rows, said to be in act-order", "awq, whole rows", "mixed with 8 bits"),
    *("auto-round as awq", "auto-round by its older name", "8 bits, version 2", "whole rows"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in _REPEATED else []) for name in CASES]
)
def test_logits_equal_those_of_what_the_checkpoint_means(name: str, tmp_path: Path) -> None:
    path, reference = CASES[name](tmp_path)
    sequences = random_tokens([9], 272)
    model = load(path, TPGroup.single())
    ours = Engine(model).logits_of(sequences, [[9]])[0]
    torch.testing.assert_close(ours, reference_logits(reference, sequences)[0], atol=1e-4, rtol=1e-4)
    assert isinstance(model.network.layers[0].mlp.down.weight, QuantizedWeight)
    planned = resolve_plan(PipelineConfig(model_path=str(path))).memory.weights
    held = sum(
        w.nbytes // (2 if w.dtype is torch.float32 and "scales" not in w.name else 1)
        for w in held_weights(model.network)
    )
    assert planned == pytest.approx(held, rel=0.05)  # plain ones are planned in bfloat16


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("8 bits", "whole rows")), "mixed with 4 bits"]
)
def test_a_plain_encoding_dequantizes(name: str, tmp_path: Path) -> None:
    path, reference = CASES[name](tmp_path)
    sequences = random_tokens([9], 272)
    ours = Engine(load(path, TPGroup.single(), SupportedEncoding.float32)).logits_of(sequences, [[9]])[0]
    torch.testing.assert_close(ours, reference_logits(reference, sequences)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("8 bits", "whole rows")), "8 bits, whole rows"]
)
def test_two_ranks_equal_one(name: str, tmp_path: Path) -> None:
    path, reference = CASES[name](tmp_path)
    sequences = random_tokens([9], 272)
    expected = reference_logits(reference, sequences)[0]
    for logits in run_ranks(2, lambda tp: Engine(load(path, tp)).logits_of(sequences, [[9]])):
        torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("hf_quant_config.json", "float8_e4m3fn"), ("8 bits", "q8_0"), ("auto-round as awq", "awq")],
)
def test_the_encoding_is_that_of_the_weights(name: str, encoding: str, tmp_path: Path) -> None:
    path, _ = CASES[name](tmp_path)
    assert resolve_plan(PipelineConfig(model_path=str(path))).encoding is SupportedEncoding(encoding)


def test_a_file_that_speaks_of_the_cache_alone_leaves_weights_plain(tmp_path: Path) -> None:
    _, plain = plain_gptq(tmp_path, 4, 32)
    content = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (plain / "hf_quant_config.json").write_text(json.dumps(content))
    assert not resolve_plan(PipelineConfig(model_path=str(plain))).encoding.is_quantized


def test_config_json_comes_before_a_file_beside_it(tmp_path: Path) -> None:
    path, _ = plain_gptq(tmp_path, 4, 32)
    (path / "quantize_config.json").write_text(json.dumps({**OLD_GPTQ, "group_size": 128}))
    load(path, TPGroup.single())


MIXED = {
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}},
}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: modelopt(folder, quant_algo="NVFP4"), r"hf_quant_config.json has quant_algo 'NVFP4'"),
        (lambda folder: modelopt(folder, **MIXED), r"has quant_algo 'NVFP4'"),
        (lambda folder: auto_round(folder, "auto_round"), "packing_format 'auto_round'; what can be read"),
        (lambda folder: auto_round(folder, "auto_round:gptq", act_bits=8), "act_bits 8"),
        (lambda folder: auto_round(folder, "auto_round:gptq", data_type="mx_fp"), "data_type 'mx_fp'"),
        (lambda folder: plain_gptq(folder, 4, 32, dynamic={"a": 8}), "dynamic {'a': 8}; what can be read: an object"),
        (lambda folder: plain_gptq(folder, 4, 32, dynamic={"+:(": {}}), r"the pattern '\('"),
        (
            lambda folder: beside(plain_gptq(folder, 4, 32), "quantize_config.json", {**OLD_GPTQ, "bits": 2}),
            "quantize_config.json has bits 2; what can be read: 4 and 8 bits",
        ),
    ],
)
def test_settings_that_are_not_read_are_named(make: Callable[[Path], Made], message: str, tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    with pytest.raises(ConfigError, match=message):
        resolve_plan(PipelineConfig(model_path=str(path)))


def test_a_group_that_no_layer_has_by_its_tensors_is_refused(tmp_path: Path) -> None:
    path, _ = mixed(tmp_path, INT4, packed(4, 32))
    config = json.loads((path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"]["targets"] = ["re:.*no_layer"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="weight is there, where the settings ask for int4"):
        resolve_plan(PipelineConfig(model_path=str(path)))
    groups["group_0"]["targets"] = ["re:.*gate_proj"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="is quantized, and the settings have no group for it"):
        resolve_plan(PipelineConfig(model_path=str(path)))


def test_8_bits_with_other_zeros_are_refused(tmp_path: Path) -> None:
    path, _ = plain_gptq(tmp_path, 8, 64)
    name = "model.layers.0.mlp.down_proj.qzeros"
    change_tensors(path, lambda tensors: tensors[name].fill_(0))
    with pytest.raises(WeightsError, match=f"{name} has zeros other than 128"):
        load(path, TPGroup.single())
