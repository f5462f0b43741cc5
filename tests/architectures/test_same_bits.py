"""Every family on a CPU: the logits of a token are the same bits in the whole prompt, in pieces of it, behind a cached
prefix, computed anew (what a preempted request is) and beside other rows; in every encoding, on 1, 2 and 4 ranks.

python -m pytest -m slow tests/architectures/test_same_bits.py     (-rA prints the table)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures.transformers_adapter import adapter_arch
from max_ray.architecture import SupportedArchitecture
from max_ray.config import PipelineConfig
from max_ray.conformance.engine import Engine, random_tokens
from max_ray.distributed import TPGroup
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import SupportedEncoding
from max_ray.kernels import native
from max_ray.nn import Module, pack_weights
from max_ray.registry import PIPELINE_REGISTRY
from max_ray.weights import open_weights
from max_ray.weights.quantize import QuantizingSource
from tests.architectures.adapter_models import make_adapter_checkpoint
from tests.architectures.families import TINY_MODELS, TinyModel, make_tiny
from tests.nn.ranks import run_ranks

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
SIZES: dict[str, Any] = {  # every width that ranks cut is a multiple of 4 * 256: groups of q4_k
    "vocab_size": 160, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 1024,
}  # fmt: skip
LATENT = {"num_key_value_heads": 16, "head_dim": 64, "kv_lora_rank": 256, "q_lora_rank": 256, "qk_nope_head_dim": 48,
          "qk_rope_head_dim": 64, "v_head_dim": 64}  # fmt: skip
ADAPTED = ["Gemma2ForCausalLM", "Olmo2ForCausalLM", "GraniteForCausalLM"]
ENCODINGS = ["float32", "bfloat16", "q8_0", "q4_k"]
PAGE, LENGTH, PREFIX, ROWS = 16, 70, 48, 16
PIECES = (1, 2, 3, 8, 16)
# (family, encoding, ranks) -> the largest difference of a logit that the README says
LISTED = {("Gemma2ForCausalLM", "float32", ranks): 1e-5 for ranks in (1, 2, 4)}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's checkpoint and record, made once."""

    @cache
    def make(name: str) -> tuple[Path, SupportedArchitecture]:
        folder = tmp_path_factory.mktemp("bits")
        if name in ADAPTED:
            PIPELINE_REGISTRY.register(adapter_arch, allow_override=True)
            sizes = {key: value for key, value in SIZES.items() if key != "moe_intermediate_size"}
            return make_adapter_checkpoint(name, folder, **sizes), adapter_arch
        model = next(model for model in TINY_MODELS if model.name == name)
        make_tiny(replace(model, overrides={**model.overrides, **_sizes(model)}), folder)
        return folder, PIPELINE_REGISTRY.retrieve_architecture(model.class_name)

    return make


def _sizes(model: TinyModel) -> dict[str, Any]:
    is_latent = "kv_lora_rank" in model.overrides
    sizes = {**SIZES, **(LATENT if is_latent else {})}
    kept = {"num_key_value_heads"} if model.overrides.get("num_key_value_heads") == 1 else set()
    if model.overrides.get("q_lora_rank", 0) is None:
        kept.add("q_lora_rank")
    return {key: value for key, value in sizes.items() if key not in kept}


def load(path: Path, record: SupportedArchitecture, encoding: SupportedEncoding, tp: TPGroup) -> Engine:
    source = open_weights(path)
    model = record.pipeline_model(
        PipelineConfig(model_path=str(path), kv_cache_page_size=PAGE),
        load_huggingface_config(path),
        encoding,
        tp.device,
        tp,
        QuantizingSource(source, encoding.value) if encoding.is_quantized else source,
        record.weight_adapters.get(record.default_weights_format),
    )
    for network in vars(model).values():
        if isinstance(network, Module):
            pack_weights(network)
    return Engine(model, num_rows=ROWS)


def differences(engine: Engine) -> dict[str, float]:
    """The largest difference from the whole prompt alone, by the way in which the prompt was computed."""
    sequences = random_tokens([LENGTH] * ROWS, 160)
    sequences[1][:PREFIX] = sequences[0][:PREFIX]
    (whole,) = engine.logits_of(sequences[:1], [[LENGTH]])
    ways = {}
    for size in PIECES:
        (got,) = engine.logits_of(sequences[:1], [[min(size, LENGTH - i) for i in range(0, LENGTH, size)]])
        ways[f"pieces of {size}"] = got
    (ways["computed anew"],) = engine.logits_of(sequences[:1], [[LENGTH - 5, 5]])
    result = {way: _difference(got, whole) for way, got in ways.items()}
    for count in (4, ROWS):
        others = [[LENGTH]] + [[7, 1, 20, 1, LENGTH - 29]] * (count - 1)
        result[f"a batch of {count}"] = _difference(engine.logits_of(sequences[:count], others)[0], whole)
        steps = [[1] * 8 for _ in range(count)]
        decoded = engine.logits_of(sequences[:count], steps)[0]
        result[f"decode steps of {count}"] = _difference(decoded, whole[:8])
    (alone,) = engine.logits_of([sequences[1]], [[LENGTH]])
    engine.logits_of(sequences[:1], [[LENGTH]])
    engine.share_prefix(0, 1, PREFIX)
    hit = engine.logits_of(sequences[:2], [[1], [LENGTH - PREFIX]], cached=[LENGTH - 1, PREFIX])[1]
    return {**result, "a prefix hit": _difference(hit, alone[PREFIX:])}


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).abs().max())


def check(folders: Any, name: str, encoding: str, ranks: int) -> None:
    path, record = folders(name)
    (found, *_) = run_ranks(ranks, lambda tp: differences(load(path, record, SupportedEncoding(encoding), tp)), 300)
    worst = max(found.values())
    print(f"| {name} | {encoding} | {ranks} | {worst:.1g} |")
    assert worst <= LISTED.get((name, encoding, ranks), 0.0), found


@pytest.mark.slow
@pytest.mark.timeout(900)  # 4 ranks change processors 60,000 times: seconds on a calm machine, minutes on a busy one
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", [*(model.name for model in TINY_MODELS), *ADAPTED])
def test_the_table(folders: Any, name: str, encoding: str, ranks: int) -> None:
    check(folders, name, encoding, ranks)


@pytest.mark.parametrize(
    ("name", "encoding", "ranks"),
    [
        ("DeepSeek V2", "float32", 1),
        ("DeepSeek V3", "float32", 1),
        ("DeepSeek V3", "bfloat16", 1),
        ("gpt-oss", "float32", 1),
        ("Llama 3", "bfloat16", 4),
    ],
)
def test_what_once_depended_on_company(folders: Any, name: str, encoding: str, ranks: int) -> None:
    check(folders, name, encoding, ranks)
