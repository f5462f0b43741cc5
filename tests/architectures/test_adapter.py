"""Decoders of transformers through the adapter: parity, the check for tokens that mix, weights, plans, refusals."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures.transformers_adapter import adapter_arch
from architectures.transformers_adapter.check import check_tokenwise
from architectures.transformers_adapter.masks import MaskSaid, read_mask
from architectures.transformers_adapter.model import TransformersAdapterModel
from max_ray.config import PipelineConfig
from max_ray.conformance.reference import huggingface_reference
from max_ray.conformance.suite import Suite
from max_ray.distributed import TPGroup
from max_ray.errors import ArchitectureNotFoundError, ConfigError, ParallelismError, WeightsError
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import PipelineTask, SupportedEncoding
from max_ray.pipelines import PIPELINE_REGISTRY
from max_ray.planning.plan import resolve_plan
from tests.architectures.adapter_models import make_adapter_checkpoint, tiny_adapter_config
from tests.architectures.adapter_table import line_of
from tests.architectures.greedy import PROMPT, served_logits
from tests.checkpoints import make_tokenizer
from tests.pipelines.conftest import VOCAB_SIZE, make_context, random_prompt, run_to_end

FLOAT32 = SupportedEncoding.float32
TABLE = Path(__file__).parents[2] / "architectures" / "ADAPTER.md"

# GPT-2: other layers than Linear, tied, learned positions. Cohere 2: windows and layers without rope. OLMo 2: a plan
# that gathers. dots.1: experts stored one by one, and a plan for them. MiniCPM 3: values narrower than keys.
PARITY = ["GPT2LMHeadModel", "Cohere2ForCausalLM", "Olmo2ForCausalLM", "Dots1ForCausalLM", "MiniCPM3ForCausalLM"]
ROUTED = {"Dots1ForCausalLM"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    PIPELINE_REGISTRY.register(adapter_arch, allow_override=True)
    yield
    PIPELINE_REGISTRY.reset()


@pytest.fixture(scope="module")
def suite_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Suite]:
    @cache
    def make(name: str) -> Suite:
        path = make_adapter_checkpoint(name, tmp_path_factory.mktemp("adapter"))
        return Suite(adapter_arch, path, huggingface_reference(path), name in ROUTED)

    return make


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", PARITY)
def test_float32(suite_of: Callable[[str], Suite], name: str, num_ranks: int) -> None:
    if name == "GPT2LMHeadModel" and num_ranks > 1:
        pytest.skip("transformers has no plan for it")
    verdicts = suite_of(name).run(num_ranks, FLOAT32)
    assert [verdict for verdict in verdicts if not verdict.passed] == []


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Dots1ForCausalLM"])
def test_bfloat16(suite_of: Callable[[str], Suite], name: str) -> None:
    verdicts = suite_of(name).run(1, SupportedEncoding.bfloat16)
    assert [verdict for verdict in verdicts if not verdict.passed] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_class_that_the_table_lists_passes() -> None:
    table = TABLE.read_text(encoding="utf-8").partition("## Refused")[0]
    names = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert len(names) >= 40
    assert [line for name in names if not (line := line_of(name)).passed] == []


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_whole_library_falls_back_to_it(tmp_path: Path, num_ranks: int, caplog: pytest.LogCaptureFixture) -> None:
    """Registry, plan, ranks, paged cache, prefix cache; and one line in the log."""
    path = make_adapter_checkpoint("ArceeForCausalLM", tmp_path, vocab_size=VOCAB_SIZE, eos_token_id=2)
    make_tokenizer().save_pretrained(path)
    config = config_of(path, kv_cache_page_size=4, tensor_parallel_size=num_ranks)
    with caplog.at_level(logging.INFO, logger="max_ray.registry"):
        _, pipeline = PIPELINE_REGISTRY.retrieve(config)
    assert [r.message for r in caplog.records if "ArceeForCausalLM: no family of ours" in r.message]
    first = random_prompt(21)
    prompts = [first, [*first[:16], 7, 8, 9]]
    outputs = [
        run_to_end(pipeline, [make_context(prompt, max_length=128, max_new_tokens=8)], num_steps=5)[0]
        for prompt in prompts
    ]
    assert [output.num_cached_tokens for output in outputs] == [0, 16]
    for prompt, output in zip(prompts, outputs, strict=True):
        (logits,) = huggingface_reference(path)([[*prompt, *output.tokens]])
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output.tokens


# -- what is refused ---------------------------------------------------------------------------------------------------


def config_of(path: Path, **settings: Any) -> PipelineConfig:
    return PipelineConfig(
        model_path=str(path), devices="cpu", num_threads=1, quantization_encoding="float32", **settings
    )


def folder_of(path: Path, class_name: str, **changes: Any) -> Path:
    """A folder with config.json and nothing else."""
    values = tiny_adapter_config(class_name).to_dict() | changes | {"architectures": [class_name]}
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("class_name", "message"),
    [
        ("MambaForCausalLM", "cannot run on a paged cache: it has layers of linear_attention"),
        ("BloomForCausalLM", "does not go through transformers' attention interface"),
        ("FalconForCausalLM", "does not go through transformers' attention interface"),
        ("DogeForCausalLM", "a mask or a bias of its own"),
        ("DeepseekV32ForCausalLM", "what ours does not know .indices."),
    ],
)
def test_a_network_that_it_cannot_run(tmp_path: Path, class_name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_plan(config_of(folder_of(tmp_path, class_name)))


@pytest.mark.parametrize("name", ["NobodysForCausalLM", "BertForMaskedLM"])
def test_a_class_that_is_no_causal_model_of_transformers(tmp_path: Path, name: str) -> None:
    path = folder_of(tmp_path, "GPT2LMHeadModel")
    values = json.loads((path / "config.json").read_text()) | {"architectures": [name]}
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ArchitectureNotFoundError, match=f"No architecture {name} is known"):
        resolve_plan(config_of(path))


def test_another_task_than_the_adapter_has(tmp_path: Path) -> None:
    config = config_of(folder_of(tmp_path, "GPT2LMHeadModel"), task="embeddings_generation")
    with pytest.raises(
        ArchitectureNotFoundError, match="GPT2LMHeadModel is known for text_generation, but not for emb"
    ):
        resolve_plan(config)


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = folder_of(tmp_path, "GPT2LMHeadModel")
    values = json.loads((path / "config.json").read_text())
    values |= {"architectures": ["NobodysForCausalLM"], "auto_map": {"AutoModelForCausalLM": "x.NobodysForCausalLM"}}
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ArchitectureNotFoundError, match="is not run"):
        resolve_plan(config_of(path))


def test_another_task_does_not_fall_back(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureNotFoundError):
        resolve_plan(config_of(folder_of(tmp_path, "GPT2LMHeadModel")), task=PipelineTask.EMBEDDINGS_GENERATION)


def test_bidirectional_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its tokens see later tokens"):
        resolve_plan(config_of(folder_of(tmp_path, "BertLMHeadModel", is_decoder=False)))


def test_a_rope_that_depends_on_the_batch_limits_the_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    path = folder_of(tmp_path, "GraniteForCausalLM", rope_parameters=rope)
    model = TransformersAdapterModel
    huggingface_config = load_huggingface_config(path)
    assert model.calculate_max_seq_len(config_of(path), huggingface_config) == 32
    with pytest.raises(ConfigError, match="max_length=33 exceeds"):
        model.calculate_max_seq_len(config_of(path, max_length=33), huggingface_config)


@pytest.mark.parametrize(
    ("class_name", "size", "message"),
    [
        ("GPT2LMHeadModel", 2, "has no tensor-parallel plan in transformers"),
        ("ArceeForCausalLM", 4, "4 query heads and 2 key heads .* sizes that work: 1, 2"),
        ("AriaTextForCausalLM", 2, "styles that are not known here: packed_rowwise"),
    ],
)
def test_ranks_that_cannot_carry_out_the_plan(tmp_path: Path, class_name: str, size: int, message: str) -> None:
    with pytest.raises(ParallelismError, match=message):
        resolve_plan(config_of(folder_of(tmp_path, class_name), tensor_parallel_size=size))


# -- the check of the loaded network -----------------------------------------------------------------------------------


class _Mixing(torch.nn.Module):
    """A feed-forward part that adds up the tokens before each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)


def test_tokens_that_mix_outside_of_attention_are_found(suite_of: Callable[[str], Suite]) -> None:
    model = suite_of("Olmo2ForCausalLM").load(TPGroup.single(), FLOAT32)
    assert isinstance(model, TransformersAdapterModel)
    model.network._network.model.layers[1].mlp = _Mixing()
    with pytest.raises(ConfigError, match="depend on the other tokens of the batch"):
        check_tokenwise(model.network, "Olmo2ForCausalLM", 160, 128)


@pytest.mark.parametrize(
    ("class_name", "message"),
    [
        ("BartForCausalLM", "positions that it counts by itself"),
        ("RobertaForCausalLM", "it numbers its tokens by itself"),
    ],
)
def test_networks_that_number_their_tokens_by_themselves(tmp_path: Path, class_name: str, message: str) -> None:
    path = make_adapter_checkpoint(class_name, tmp_path)
    with pytest.raises(ConfigError, match=message):
        Suite(adapter_arch, path, lambda sequences: []).load(TPGroup.single(), FLOAT32)


@pytest.mark.parametrize(
    ("function", "local_size", "said"),
    [
        (lambda b, h, q, k: k <= q, None, MaskSaid()),
        (lambda b, h, q, k: (k <= q) & (k > q - 7), 7, MaskSaid(7)),
        (lambda b, h, q, k: (k <= q) & (k > q - 1), 1, MaskSaid(1)),
        (lambda b, h, q, k: (k <= q) & (k // 8 == q // 8), 8, MaskSaid(limit=8)),
    ],
)
def test_masks_that_are_served(function: Any, local_size: int | None, said: MaskSaid) -> None:
    assert read_mask(function, local_size) == said


@pytest.mark.parametrize(
    ("function", "local_size", "reason"),
    [
        (lambda b, h, q, k: (k <= q) & (k // 8 == q // 8), 7, "neither causal nor a sliding window"),
        (lambda b, h, q, k: (k <= q) & ((k + 1) // 8 == (q + 1) // 8), 8, "neither causal nor a sliding window"),
        (lambda b, h, q, k: (k <= q) & (k > q - 100), None, "neither causal nor"),
        (lambda b, h, q, k: k >= 0, None, "bidirectional"),
        (lambda b, h, q, k: (k - q).abs() < 5, 5, "bidirectional"),
        (lambda b, h, q, k: torch.zeros(5)[k] > q, None, "more than the positions"),
    ],
)
def test_masks_that_are_not(function: Any, local_size: int | None, reason: str) -> None:
    assert reason in read_mask(function, local_size).refused


# -- weights -----------------------------------------------------------------------------------------------------------


def edited(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The checkpoint with other tensors in it."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_missing_left_over_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    path = make_adapter_checkpoint("Dots1ForCausalLM", tmp_path)
    suite = Suite(adapter_arch, path, lambda sequences: [])
    one = "model.layers.0.self_attn.o_proj.weight"
    edited(path, lambda tensors: tensors.update({"x.weight": torch.ones(1), "y": tensors.pop(one)}))
    with pytest.raises(WeightsError, match=rf"lacks 1 tensor \({one}\); the network has no place for 2"):
        suite.load(TPGroup.single(), FLOAT32)
    edited(
        path,
        lambda tensors: tensors.update({one: torch.ones(2, 2), "z": [tensors.pop("x.weight"), tensors.pop("y")][0]}),
    )
    edited(path, lambda tensors: tensors.pop("z"))
    with pytest.raises(WeightsError, match=r"The shape of model\.layers\.0\.self_attn\.o_proj\.weight"):
        suite.load(TPGroup.single(), FLOAT32)
    edited(path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(WeightsError, match="experts"):
        suite.load(TPGroup.single(), FLOAT32)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_tied_head_that_is_stored_too(tmp_path: Path, factor: float) -> None:
    """A copy is dropped; other values make it a head of its own, as transformers has it."""
    path = make_adapter_checkpoint("ArceeForCausalLM", tmp_path, tie_word_embeddings=True)
    edited(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * factor}))
    suite = Suite(adapter_arch, path, huggingface_reference(path))
    assert [verdict for verdict in suite.run(1, FLOAT32) if not verdict.passed] == []
    edited(path, lambda t: t.pop("model.embed_tokens.weight"))
    if factor == 1.0:
        assert [verdict for verdict in suite.run(1, FLOAT32) if not verdict.passed] == []


def test_attention_in_chunks_up_to_the_end_of_the_first_one(tmp_path: Path) -> None:
    """Llama 4: within a chunk its layers see all before, so a text that fits into one is computed as it should be."""
    path = make_adapter_checkpoint("Llama4ForCausalLM", tmp_path, attention_chunk_size=24, floor_scale=4)
    config = config_of(path)
    plan = resolve_plan(config)
    assert plan.max_length == 24
    with pytest.raises(ConfigError, match="supports through transformers' code: 24 tokens"):
        resolve_plan(config.replace(max_length=25))
    expected = huggingface_reference(path)([PROMPT])[0]
    torch.testing.assert_close(served_logits(path), expected, atol=1e-3, rtol=0)
