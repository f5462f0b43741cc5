"""Llama from quantized checkpoints, and quantized while it is read, against Hugging Face on what they mean."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures.llama3.arch import llama_arch
from architectures.llama3.model import Llama3Model
from architectures.llama3.weight_adapters import safetensors_name_map
from max_ray.config import PipelineConfig
from max_ray.distributed import TPGroup
from max_ray.errors import ConfigError, EncodingNotSupportedError, ParallelismError, WeightsError
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import SupportedEncoding, WeightsFormat
from max_ray.nn.quantized_linear import QuantizedWeight
from max_ray.pipelines import resolve_plan
from max_ray.planning.checkpoint import open_checkpoint
from max_ray.weights import DictWeightSource
from max_ray.weights.quantization_scheme import Scheme, Schemes
from max_ray.weights.quantized_checkpoint import QuantizedCheckpoint
from tests.architectures.engine import Engine, random_tokens
from tests.architectures.reference import reference_logits
from tests.checkpoints import make_llama
from tests.held_weights import held_weights
from tests.nn.ranks import run_ranks

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Made = tuple[Path, Path]


@dataclass(frozen=True)
class Float32Activations:
    cache_dtype: str = "float32"


def pack_nibbles(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[a, 8 b] -> int32 [a, b]."""
    split = codes.long().reshape(codes.shape[0], -1, 8)
    packed = sum(split[..., column] << 4 * i for i, column in enumerate(order))
    assert isinstance(packed, torch.Tensor)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def four_bits(
    method: str, size: int, act_order: bool, generator: torch.Generator, shape: tuple[int, int]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of one layer, and the matrix [N, K] that they mean."""
    num_rows, num_columns = shape
    codes = torch.randint(0, 16, (num_columns, num_rows), generator=generator)
    zeros = torch.randint(1, 16, (num_columns // size, num_rows), generator=generator)
    zeros[:, ::8] = 0  # GPTQ stores one less, modulo 16
    scales = (torch.rand(num_columns // size, num_rows, generator=generator) * 0.03).half()
    groups = torch.arange(num_columns) // size
    if act_order:
        groups = groups[torch.randperm(num_columns, generator=generator)]
    weight = ((codes - zeros[groups]) * scales.float()[groups]).t().contiguous()
    if method == "awq":
        return {
            "qweight": pack_nibbles(codes, AWQ_ORDER),
            "qzeros": pack_nibbles(zeros, AWQ_ORDER),
            "scales": scales,
        }, weight
    return {
        "qweight": pack_nibbles(codes.t()).t().contiguous(),
        "qzeros": pack_nibbles((zeros - 1) % 16),
        "scales": scales,
        "g_idx": groups.to(torch.int32),
    }, weight


def fp8(strategy: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    if strategy == "block":
        scales = torch.rand(-(-weight.shape[0] // 128), weight.shape[1] // 128) * 0.01 + 0.01
        spread = scales.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)
        name = "weight_scale_inv"
    else:
        scales = torch.rand(weight.shape[0] if strategy == "channel" else 1, 1) * 0.01 + 0.01
        spread, name = scales, "weight_scale"
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scales}, codes.float() * spread


def make(folder: Path, quantization: dict[str, Any], layer: Callable[[torch.Tensor], Any]) -> Made:
    """(quantized checkpoint, the same dequantized to float32)."""
    return make_named(folder, quantization, lambda name, tensor: layer(tensor))


def make_named(
    folder: Path, quantization: dict[str, Any], layer: Callable[[str, torch.Tensor], Any], **sizes: int
) -> Made:
    plain, quantized = (make_llama(folder / name, **SIZES | sizes) for name in ("plain", "quantized"))
    tensors, means = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        tensors[name] = means[name] = tensor
        if ".layers." in name and tensor.dim() == 2:
            parts, means[name] = layer(name, tensor)
            del tensors[name]
            tensors |= {f"{name.removesuffix('.weight')}.{part}": data.contiguous() for part, data in parts.items()}
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(means, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantized / "config.json").read_text()) | {"quantization_config": quantization}
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, plain


def make_four_bits(folder: Path, method: str, size: int, act_order: bool = False) -> Made:
    generator = torch.Generator().manual_seed(3)
    settings = {"quant_method": method, "bits": 4, "group_size": size, "desc_act": act_order}

    def layer(tensor: torch.Tensor) -> Any:
        return four_bits(method, size, act_order, generator, (tensor.shape[0], tensor.shape[1]))

    return make(folder, settings, layer)


def pack_bytes(numbers: torch.Tensor) -> torch.Tensor:
    """-128..127 [a, 4 b] -> int32 [a, b]."""
    return (numbers + 128).to(torch.uint8).view(torch.int32)


def integers(
    bits: int, size: int, asymmetric: bool, act_order: bool, generator: torch.Generator, shape: tuple[int, int]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of one layer as compressed-tensors packs them, and the matrix [N, K] that they mean. size: 0 for one
    scale a row."""
    num_rows, num_columns = shape
    num_groups, half = num_columns // size if size else 1, 1 << bits - 1
    numbers = torch.randint(-half, half, (num_rows, num_columns), generator=generator)
    scales = (torch.rand(num_rows, num_groups, generator=generator) * 0.24 / half + 2**-10).bfloat16()
    zeros = torch.randint(-8, 8, (num_rows, num_groups), generator=generator) * asymmetric
    groups = torch.arange(num_columns) // (size or num_columns)
    if act_order:
        groups = groups[torch.randperm(num_columns, generator=generator)]
    parts = {
        "weight_packed": pack_nibbles(numbers + 8) if bits == 4 else pack_bytes(numbers),
        "weight_scale": scales,
        "weight_shape": torch.tensor(shape),
    }
    if asymmetric:
        padded = torch.nn.functional.pad(zeros + 8, (0, 0, 0, -num_rows % 8))
        parts["weight_zero_point"] = pack_nibbles(padded.t()).t()
    if act_order:
        parts["weight_g_idx"] = groups.to(torch.int32)
    return parts, (numbers - zeros[:, groups]) * scales.float()[:, groups]


def packed_settings(bits: int, size: int, asymmetric: bool = False, act_order: bool = False) -> dict[str, Any]:
    weights = {
        **{"num_bits": bits, "type": "int", "symmetric": not asymmetric, "strategy": "group" if size else "channel"},
        **{"group_size": size or None, "actorder": "group" if act_order else None, "dynamic": False},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"},
        **{"config_groups": {"group_0": group}, "kv_cache_scheme": None, "ignore": ["lm_head"]},
    }


def make_packed(
    folder: Path,
    bits: int,
    size: int,
    asymmetric: bool = False,
    act_order: bool = False,
    ignored: str = "no layer",
    **sizes: int,
) -> Made:
    """ignored: what the names of matrices have that are not quantized."""
    generator = torch.Generator().manual_seed(5)

    def layer(name: str, tensor: torch.Tensor) -> Any:
        if ignored in name:
            return {"weight": tensor}, tensor
        return integers(bits, size, asymmetric, act_order, generator, (tensor.shape[0], tensor.shape[1]))

    settings = packed_settings(bits, size, asymmetric, act_order)
    settings["ignore"] += [f"re:.*{ignored}", "model.layers.0.mlp.gate_up_proj"]
    return make_named(folder, settings, layer, **sizes)


def make_fp8(folder: Path, strategy: str) -> Made:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy}
    settings: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
    }
    if strategy == "block":
        settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return make_fp8_as(folder, settings, strategy)


def make_fp8_as(folder: Path, settings: dict[str, Any], strategy: str) -> Made:
    torch.manual_seed(4)
    return make(folder, settings, lambda tensor: fp8(strategy, tensor))


BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}


CASES: dict[str, Callable[[Path], Made]] = {
    "gptq 32": lambda folder: make_four_bits(folder, "gptq", 32),
    "gptq 64 act-order": lambda folder: make_four_bits(folder, "gptq", 64, act_order=True),
    "gptq 128": lambda folder: make_four_bits(folder, "gptq", 128),
    "awq 64": lambda folder: make_four_bits(folder, "awq", 64),
    "awq 128": lambda folder: make_four_bits(folder, "awq", 128),
    "packed 32": lambda folder: make_packed(folder, 4, 32),
    "packed 64 asymmetric": lambda folder: make_packed(folder, 4, 64, asymmetric=True),
    "packed 128": lambda folder: make_packed(folder, 4, 128),
    "packed 32 act-order": lambda folder: make_packed(folder, 4, 32, act_order=True),
    "packed 64 asymmetric act-order": lambda folder: make_packed(folder, 4, 64, asymmetric=True, act_order=True),
    "packed 32, some layers not": lambda folder: make_packed(folder, 4, 32, ignored="k_proj"),
    "packed channel": lambda folder: make_packed(folder, 4, 0),
    "packed channel asymmetric": lambda folder: make_packed(folder, 4, 0, asymmetric=True),
    "packed channel of 96 columns": lambda folder: make_packed(folder, 4, 0, hidden_size=96, intermediate_size=160),
    "packed bytes 64": lambda folder: make_packed(folder, 8, 64),
    "packed bytes 32 act-order": lambda folder: make_packed(folder, 8, 32, act_order=True),
    "packed bytes channel": lambda folder: make_packed(folder, 8, 0),
    "fp8 tensor": lambda folder: make_fp8(folder, "tensor"),
    "fp8 channel": lambda folder: make_fp8(folder, "channel"),
    "fp8 block": lambda folder: make_fp8(folder, "block"),
    "compressed-tensors block": lambda folder: make_fp8_as(
        folder, {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": BLOCKS}}}, "block"
    ),
    "fbgemm": lambda folder: make_fp8_as(folder, {"quant_method": "fbgemm_fp8"}, "channel"),
    "modelopt": lambda folder: make_fp8_as(folder, {"quant_method": "modelopt", "quant_algo": "FP8"}, "tensor"),
}


def load(path: Path, tp: TPGroup, encoding: SupportedEncoding | None = None) -> Llama3Model:
    settings = PipelineConfig(model_path=str(path), quantization_encoding=encoding)
    plan = resolve_plan(settings)
    source = open_checkpoint(path, WeightsFormat.safetensors, load_huggingface_config(path), plan.encoding)
    activations = Float32Activations()
    return Llama3Model(settings, plan.huggingface_config, activations, tp.device, tp, source, safetensors_name_map)


@pytest.mark.parametrize("name", list(CASES))
def test_logits_equal_those_of_what_the_checkpoint_means(name: str, tmp_path: Path) -> None:
    path, reference = CASES[name](tmp_path)
    model = load(path, TPGroup.single())
    assert isinstance(model.network.layers[0].mlp.down.weight, QuantizedWeight)
    sequences = random_tokens([9, 1], 272)
    expected = reference_logits(reference, sequences)
    plan = resolve_plan(PipelineConfig(model_path=str(path)))
    held = sum(
        weight.nbytes // (2 if weight.dtype == torch.float32 and "scales" not in weight.name else 1)
        for weight in held_weights(model.network)
    )
    assert plan.memory.weights == pytest.approx(held, rel=0.05)  # plain ones are planned in bfloat16
    dequantized = load(path, TPGroup.single(), SupportedEncoding.float32)
    assert not isinstance(dequantized.network.layers[0].mlp.down.weight, QuantizedWeight)
    for loaded in (model, dequantized):
        for mine, theirs in zip(Engine(loaded).logits_of(sequences, [[4, 5], [1]]), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("gptq 32", "awq 64", "fp8 channel", "packed 32", "packed 64 asymmetric", "packed channel asymmetric"),
        *("packed 32, some layers not", "packed bytes channel"),
    ],
)
def test_two_ranks_equal_one(name: str, tmp_path: Path) -> None:
    path, reference = CASES[name](tmp_path)
    sequences = random_tokens([9], 272)
    expected = reference_logits(reference, sequences)[0]
    for logits in run_ranks(2, lambda tp: Engine(load(path, tp)).logits_of(sequences, [[9]])):
        torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(("gptq 128", "groups of 128"), ("gptq 64 act-order", "desc_act"), ("fp8 block", "groups of")),
        *(("packed 128", "groups of 128"), ("packed 32 act-order", 'actorder "group"')),
    ],
)
def test_ranks_that_would_cut_through_a_group_are_refused(name: str, message: str, tmp_path: Path) -> None:
    path, _ = CASES[name](tmp_path)
    with pytest.raises(ParallelismError, match=message):
        load(path, TPGroup(rank=1, size=2, device=torch.device("cpu")))
    if "act-order" not in name:  # which columns a group has is not in the headers
        with pytest.raises(ParallelismError, match=message):
            resolve_plan(PipelineConfig(model_path=str(path), devices="cpu", tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits 3; what can be read: 4 and 8 bits"),
        ({"bits": 8, "sym": False}, "sym False; what can be read: of 8 bits, symmetric weights"),
        ({"group_size": 16}, "group_size 16"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "compressed-tensors", "config_groups": {"FP8": ["Linear"]}}, "config_groups: FP8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'; what can be read: FP8"),
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'"),
    ],
)
def test_schemes_that_are_not_read_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path, _ = make_four_bits(tmp_path, "gptq", 64)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        resolve_plan(PipelineConfig(model_path=str(path)))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_biases_of_zeros_are_left_out_and_others_are_not(tmp_path: Path) -> None:
    """AutoGPTQ writes a bias for every layer, whether it has one or not."""
    path, reference = make_four_bits(tmp_path, "gptq", 64)
    zeros = {f"model.layers.0.{name}.bias": torch.zeros(128).half() for name in ("self_attn.o_proj", "mlp.down_proj")}
    change_tensors(path, lambda tensors: tensors.update(zeros))
    sequences = random_tokens([9], 272)
    ours = Engine(load(path, TPGroup.single())).logits_of(sequences, [[9]])[0]
    torch.testing.assert_close(ours, reference_logits(reference, sequences)[0], atol=1e-4, rtol=1e-4)
    change_tensors(path, lambda tensors: tensors["model.layers.0.mlp.down_proj.bias"].fill_(0.5))
    with pytest.raises(WeightsError, match=r"no place for 1 tensor \(model.layers.0.mlp.down_proj.bias\)"):
        load(path, TPGroup.single())


@pytest.mark.parametrize(
    "name", ["k_proj.output_scale", "k_proj.input_scale", "k_proj.activation_scale", "attn.q_scale", "kv_scale"]
)
def test_scales_of_activations_and_of_the_cache_are_left_out(name: str, tmp_path: Path) -> None:
    path, _ = make_fp8(tmp_path, "tensor")
    change_tensors(path, lambda tensors: tensors.update({f"model.layers.0.self_attn.{name}": torch.ones(1)}))
    load(path, TPGroup.single())


@pytest.mark.parametrize("name", ["self_attn.k_scale", "self_attn.v_scale", "mlp.down_proj.input_scale"])
def test_packed_weights_beside_a_cache_of_8_bits(name: str, tmp_path: Path) -> None:
    path, _ = make_packed(tmp_path, 4, 32)
    change_tensors(path, lambda tensors: tensors.update({f"model.layers.0.{name}": torch.ones(1)}))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    of_attention = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8}}
    config["quantization_config"]["config_groups"]["group_1"] = of_attention
    (path / "config.json").write_text(json.dumps(config))
    load(path, TPGroup.single())


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(("real", "said"), [(64, 32), (32, 128)])
def test_a_wrong_group_size_is_refused_before_anything_is_read(
    method: str, real: int, said: int, tmp_path: Path
) -> None:
    path, _ = make_four_bits(tmp_path, method, real)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["group_size"] = said
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=rf"with quantization_config's group_size {said} it must be"):
        resolve_plan(PipelineConfig(model_path=str(path)))


def test_float8_numbers_without_a_scale_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    path, _ = make_fp8(tmp_path, "tensor")
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(path, lambda tensors: tensors.__delitem__(f"{name}_scale"))
    with pytest.raises(WeightsError, match=f"{name} is in F8_E4M3, and the checkpoint has no {name}_scale"):
        resolve_plan(PipelineConfig(model_path=str(path)))


def test_float8_of_another_kind_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path, _ = make_fp8(tmp_path, "tensor")
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(path, lambda tensors: tensors.update({name: tensors[name].float().to(torch.float8_e5m2)}))
    with pytest.raises(WeightsError, match=f"{name} has scales and is in F8_E5M2"):
        resolve_plan(PipelineConfig(model_path=str(path)))


def test_tensors_that_no_table_knows_are_refused_by_the_plan(tmp_path: Path) -> None:
    path, _ = make_four_bits(tmp_path, "gptq", 64)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]  # older checkpoints have it in a file of its own
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="no place for 28 tensors"):
        resolve_plan(PipelineConfig(model_path=str(path)))


def test_a_checkpoint_of_many_experts_is_opened_in_no_time() -> None:
    """What a name stands for is looked up, not searched for: half a minute otherwise."""
    code, scale = torch.empty(1, 128, dtype=torch.float8_e4m3fn), torch.ones(1, 1)
    experts = [f"model.layers.{i // 256}.mlp.experts.{i % 256}.up_proj" for i in range(40_000)]
    tensors = {f"{name}.weight": code for name in experts} | {f"{name}.weight_scale": scale for name in experts}
    start = time.perf_counter()
    QuantizedCheckpoint(DictWeightSource(tensors), Schemes(Scheme("fp8", 0)), keep_quantized=True)
    assert time.perf_counter() - start < 5


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    path, _ = make_fp8(tmp_path, "channel")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"][3] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"mlp.down_proj.weight' has scales that are no finite numbers"):
        load(path, TPGroup.single())


def test_plain_checkpoints_are_quantized_while_they_are_read(tmp_path: Path) -> None:
    path = make_llama(tmp_path, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    sequences = random_tokens([16], 272)
    exact = reference_logits(path, sequences)[0].log_softmax(-1)
    losses = []
    for encoding in ("q8_0", "q6_k", "q5_k", "q4_k"):
        model = load(path, TPGroup.single(), SupportedEncoding(encoding))
        ours = Engine(model).logits_of(sequences, [[16]])[0].log_softmax(-1)
        losses.append((exact.exp() * (exact - ours)).sum(-1).mean().item())
    assert 0 < losses[0] < losses[1] < losses[2] < losses[3] < 0.1


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
ROTATED = {"apply": [{"location": "weight_output"}, {"location": "input"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 3}, r"config_groups: weights \(3, 'int'\); what can be read: 8 bits, type float, and in"),
        ({"type": "float"}, r"config_groups: weights \(4, 'float'\)"),
        ({"strategy": "tensor"}, "strategy 'tensor'; what can be read: of integers, group and channel"),
        ({"group_size": 16}, "group_size 16; what can be read: groups of 32, 64, 128"),
        ({"num_bits": 8, "symmetric": False}, "symmetric False; what can be read: of 8 bits, symmetric ones"),
        ({"format": "marlin-24"}, "format 'marlin-24'; what can be read: of integers, pack-quantized"),
        ({"transform_config": {"config_groups": {"R": ROTATED}}}, r"transform_config: R \['input'\]"),
        (
            {"config_groups": {"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | {"group_size": 64}}}},
            r"config_groups \['a', 'b'\]; what can be read: the same numbers",
        ),
    ],
)
def test_packed_integers_that_are_not_read_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path, _ = make_packed(tmp_path, 4, 32)
    config = json.loads((path / "config.json").read_text())
    settings = config["quantization_config"]
    in_weights = {key: value for key, value in change.items() if key in WEIGHTS}
    settings["config_groups"]["group_0"]["weights"] |= in_weights
    settings |= {key: value for key, value in change.items() if key not in WEIGHTS}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        resolve_plan(PipelineConfig(model_path=str(path)))


DOWN = "model.layers.0.mlp.down_proj.weight"


def unpacked_zeros(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}_zero_point"] = torch.zeros(128, 8, dtype=torch.int8)


@pytest.mark.parametrize(
    ("asymmetric", "change", "message"),
    [
        (False, lambda tensors: tensors.pop(f"{DOWN}_packed"), f"{DOWN}_scale is there, but no {DOWN}_packed"),
        (False, lambda tensors: tensors.pop(f"{DOWN}_scale"), f"no tensor '{DOWN}_scale'"),
        (False, unpacked_zeros, f"{DOWN}_zero_point is there, but .* says that weights are symmetric"),
        (True, lambda tensors: tensors.pop(f"{DOWN}_zero_point"), f"no tensor '{DOWN}_zero_point'"),
        (True, unpacked_zeros, rf"{DOWN}_zero_point is \[128, 8\]; .* it must be \[16, 8\]"),
        (
            False,
            lambda tensors: tensors.update({f"{DOWN}_packed": tensors[f"{DOWN}_packed"][:, 1:].contiguous()}),
            f"{DOWN}_packed has 248 columns, which are no whole groups of 32",
        ),
        (
            False,
            lambda tensors: tensors.update({f"{DOWN}_packed": tensors[f"{DOWN}_packed"].view(torch.uint8)}),
            rf"{DOWN}_packed is \[128, 128\] in U8; what can be read: matrices, packed in I32",
        ),
        (
            False,
            lambda tensors: tensors.update({f"{DOWN}_g_idx": torch.zeros(128, dtype=torch.int32)}),
            rf"{DOWN}_g_idx is \[128\]; .* it must be \[256\]",
        ),
    ],
)
def test_packed_tensors_that_do_not_agree_are_refused_before_anything_is_read(
    asymmetric: bool, change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    path, _ = make_packed(tmp_path, 4, 32, asymmetric)
    change_tensors(path, change)
    with pytest.raises(WeightsError, match=message):
        resolve_plan(PipelineConfig(model_path=str(path)))


@pytest.mark.parametrize(("bits", "encoding"), [(4, SupportedEncoding.gptq), (8, SupportedEncoding.q8_0)])
def test_packed_integers_are_an_encoding_that_a_family_has_or_not(
    bits: int, encoding: SupportedEncoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = make_packed(tmp_path, bits, 32)
    assert resolve_plan(PipelineConfig(model_path=str(path))).encoding is encoding
    monkeypatch.delitem(llama_arch.supported_encodings, encoding)
    with pytest.raises(EncodingNotSupportedError, match=f"in {encoding.value}, which LlamaForCausalLM does not"):
        resolve_plan(PipelineConfig(model_path=str(path)))


def test_a_row_that_ends_within_an_int32_is_refused(tmp_path: Path) -> None:
    """One scale a row allows any number of columns; the headers only tell how many int32 there are."""
    path, _ = make_packed(tmp_path, 4, 0)
    change_tensors(path, lambda tensors: tensors.update({f"{DOWN}_shape": torch.tensor([128, 253])}))
    with pytest.raises(WeightsError, match=rf"{DOWN}_shape is \[128, 253\], and .* a matrix of \[128, 256\]"):
        load(path, TPGroup.single())


def test_zeros_of_rows_that_are_no_multiple_of_8() -> None:
    parts, meant = integers(4, 32, True, False, torch.Generator().manual_seed(6), (13, 64))
    source = DictWeightSource({f"x.{name}": tensor for name, tensor in parts.items()})
    checkpoint = QuantizedCheckpoint(source, Schemes(Scheme("int4", 32, has_zeros=True)), keep_quantized=True)
    for rows in (range(13), range(9, 13), range(3, 9)):
        read = checkpoint.get_quantized("x.weight", rows, range(32, 64)).dequantize()
        torch.testing.assert_close(read, meant[rows.start : rows.stop, 32:])


def test_an_order_that_was_never_filled_in(tmp_path: Path) -> None:
    path, reference = make_packed(tmp_path, 4, 64)
    unset = torch.full((256,), -1, dtype=torch.int32)
    change_tensors(path, lambda tensors: tensors.update({f"{DOWN}_g_idx": unset}))
    sequences = random_tokens([9], 272)
    ours = Engine(load(path, TPGroup.single())).logits_of(sequences, [[9]])[0]
    torch.testing.assert_close(ours, reference_logits(reference, sequences)[0], atol=1e-4, rtol=1e-4)


def test_scales_beyond_float16_are_refused_and_can_be_dequantized(tmp_path: Path) -> None:
    path, _ = make_packed(tmp_path, 4, 64)
    change_tensors(path, lambda tensors: tensors[f"{DOWN}_scale"].fill_(1e5))
    with pytest.raises(WeightsError, match=rf"{DOWN} has scales up to 99840, and float16.* --quantization-encoding"):
        load(path, TPGroup.single())
    plain = load(path, TPGroup.single(), SupportedEncoding.float32).network.layers[0].mlp.down.weight
    assert plain.abs().max() > 65504


def test_a_dequantized_checkpoint_has_scales_as_they_are_stored(tmp_path: Path) -> None:
    path, _ = make_packed(tmp_path, 4, 64)
    change_tensors(path, lambda tensors: tensors[f"{DOWN}_scale"].fill_(1e-8))
    plain = load(path, TPGroup.single(), SupportedEncoding.float32).network.layers[0].mlp.down.weight
    assert plain.abs().max() > 0
