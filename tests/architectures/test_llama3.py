"""The Llama family against Hugging Face in float32, on tiny random checkpoints: logits and greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures.llama3 import ARCHITECTURES, llama_arch
from architectures.llama3.model_config import Llama3Config
from architectures.llama3.weight_adapters import safetensors_name_map
from max_ray.distributed import TPGroup
from max_ray.errors import ConfigError, ParallelismError, WeightsError
from max_ray.huggingface import HuggingFaceConfig, load_huggingface_config
from max_ray.weights import DictWeightSource
from tests.architectures.engine import Engine, load_model, random_tokens
from tests.architectures.reference import assert_parity, reference_logits
from tests.checkpoints import load_reference, make_llama
from tests.held_weights import held_weights
from tests.nn.ranks import run_ranks

PAGE = 16
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "odd vocabulary": {"vocab_size": 97},
    "one layer": {"num_hidden_layers": 1},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    "dynamic": {
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 500_000.0,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 10_000.0,
        }
    },
}
TP_VARIANTS = ["grouped-query", "multi-query", "tied", "biases", "odd vocabulary", "dynamic"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """variant name -> folder, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_llama(tmp_path_factory.mktemp("llama"), tokenizer=False, **VARIANTS[name])
        return made[name]

    return get


def vocab_size(name: str) -> int:
    return VARIANTS[name].get("vocab_size", 272)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("page_size", [1, PAGE])
def test_logits_of_a_ragged_batch_of_whole_prompts(checkpoint: Any, name: str, page_size: int) -> None:
    sequences = random_tokens([PAGE + 1, 1, 40], vocab_size(name))
    engine = Engine(load_model(checkpoint(name), page_size=page_size))
    assert_parity(checkpoint(name), engine, sequences, [[len(s)] for s in sequences])


@pytest.mark.parametrize("page_size", [1, PAGE])
@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1])
def test_one_prompt_at_the_page_borders(checkpoint: Any, page_size: int, length: int) -> None:
    path = checkpoint("grouped-query")
    sequences = random_tokens([length], 272, seed=length)
    assert_parity(path, Engine(load_model(path, page_size=page_size)), sequences, [[length]])


@pytest.mark.parametrize("name", ["grouped-query", "dynamic", "yarn"])
@pytest.mark.parametrize("page_size", [1, PAGE])
def test_prefill_chunks_and_decode_share_steps(checkpoint: Any, name: str, page_size: int) -> None:
    """Chunk edges inside, on and after a page; rows of different ages in every step. Rope `dynamic` included: a chunk
    rotates by the length of the whole prompt."""
    sequences = random_tokens([37, 20, 18], vocab_size(name), seed=1)
    chunks = [[5, PAGE - 5, 1, 20], [PAGE, 1, 1, 1, 1], [17, 1]]
    assert_parity(checkpoint(name), Engine(load_model(checkpoint(name), page_size=page_size)), sequences, chunks)


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_are_hugging_faces(checkpoint: Any, name: str) -> None:
    """`dynamic` grows past max_position_embeddings on the way, one length a token."""
    (prompt,) = random_tokens([20], vocab_size(name), seed=2)
    reference = load_reference(checkpoint(name))
    want = reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert Engine(load_model(checkpoint(name))).greedy(prompt, 24) == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", TP_VARIANTS)
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_ranks_equal_one(checkpoint: Any, name: str, size: int) -> None:
    path = checkpoint(name)
    sequences = random_tokens([PAGE + 1, 1, 30], vocab_size(name), seed=3)
    chunks = [[9, 8], [1], [29, 1]]
    ranks = run_ranks(size, lambda tp: Engine(load_model(path, tp)).logits_of(sequences, chunks))
    reference = reference_logits(path, sequences)
    for logits in ranks:
        for mine, theirs in zip(logits, reference, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_only_the_wanted_logits_are_computed(checkpoint: Any) -> None:
    engine = Engine(load_model(checkpoint("grouped-query")))
    rows = [engine._row(0, [1, 2, 3], 0, 3), engine._row(1, [4, 5], 0, 2)]
    rows[0].echo = False
    rows[1].echo, rows[1].max_new_tokens = False, 0  # a chunk of a longer prompt
    assert engine._forward(rows).shape == (1, 272)
    assert engine._forward(rows[1:]).shape == (0, 272)


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    path = make_llama(tmp_path, max_shard_size=20_000, tokenizer=False)
    assert len(list(path.glob("*.safetensors"))) > 1
    sequences = random_tokens([9], 272)
    assert_parity(path, Engine(load_model(path)), sequences, [[9]])


@pytest.mark.parametrize("encoding", ["bfloat16", "float16"])
def test_half_precision_is_as_close_as_hugging_faces_own(tmp_path: Path, encoding: str) -> None:
    """Of a float32 model, our rounding errors may be at most twice theirs in the same dtype."""
    path = make_llama(tmp_path, tokenizer=False)
    sequences = random_tokens([33, 7], 272, seed=4)
    exact = reference_logits(path, sequences)
    theirs = reference_logits(path, sequences, getattr(torch, encoding))
    ours = Engine(load_model(path, encoding=encoding)).logits_of(sequences, [[20, 13], [7]])
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == getattr(torch, encoding)
        their_error = (other.float() - truth).abs().mean()
        assert (mine.float() - truth).abs().mean() < 2 * their_error


def test_a_bfloat16_checkpoint_runs_in_float32_too(tmp_path: Path) -> None:
    path = make_llama(tmp_path, dtype=torch.bfloat16, tokenizer=False)
    sequences = random_tokens([12], 272)
    assert_parity(path, Engine(load_model(path)), sequences, [[12]])


def test_a_tied_checkpoint_that_carries_its_head_anyway(checkpoint: Any, tmp_path: Path) -> None:
    tensors = load_file(checkpoint("tied") / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint("tied") / "config.json").read_text())
    sequences = random_tokens([5], 272)
    assert_parity(checkpoint("tied"), Engine(load_model(tmp_path)), sequences, [[5]])


def test_tied_weights_share_their_memory(checkpoint: Any) -> None:
    names = [weight.name for weight in held_weights(load_model(checkpoint("tied")).network)]
    assert "embed_tokens.weight" in names
    assert not [name for name in names if name.startswith("lm_head")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": None}, r"lacks 1 tensor \(lm_head.weight\)"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "no place for .*q_proj.bias"),
        ({"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}, "no place for .*layers.2.mlp.up_proj"),
        ({"model.norm.weight": torch.zeros(31)}, r"model.norm.weight is \[31\] .* wants \[32\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(checkpoint: Any, change: dict[str, Any], message: str) -> None:
    from architectures.llama3.model import Llama3Model

    path = checkpoint("grouped-query")
    tensors = {**load_file(path / "model.safetensors"), **change}
    model = load_model(path)
    source = DictWeightSource({k: v for k, v in tensors.items() if v is not None})
    with pytest.raises(WeightsError, match=message):
        Llama3Model(model.pipeline_config, model.huggingface_config, model.encoding, model.device, model.tp, source)


def test_the_checkpoint_is_let_go_after_loading(checkpoint: Any) -> None:
    assert not hasattr(load_model(checkpoint("grouped-query")), "weights")


def test_too_many_ranks_are_refused_before_anything_is_read(checkpoint: Any) -> None:
    with pytest.raises(ParallelismError, match="num_attention_heads=4 cannot be divided over tensor_parallel_size=3"):
        load_model(checkpoint("grouped-query"), TPGroup(rank=0, size=3, device=torch.device("cpu")))


def test_another_activation_is_refused(checkpoint: Any) -> None:
    values = json.loads((checkpoint("grouped-query") / "config.json").read_text())
    with pytest.raises(ConfigError, match="hidden_act='tanh'"):
        Llama3Config.from_huggingface(HuggingFaceConfig({**values, "hidden_act": "tanh"}))


def test_numbers_left_out_have_the_familys_defaults() -> None:
    config = Llama3Config.from_huggingface(
        HuggingFaceConfig(
            {
                "vocab_size": 10,
                "hidden_size": 8,
                "intermediate_size": 4,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        )
    )
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (2, 4, 1e-6)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)


def test_every_own_weight_has_one_name_in_the_table(checkpoint: Any) -> None:
    """The table works both ways: own names -> checkpoint names -> own names."""
    from max_ray.weights import OwnName

    path = checkpoint("biases")
    names = safetensors_name_map(load_huggingface_config(path))
    for name, parameter in load_model(path).network.sharded_parameters():
        for part in parameter.parts:
            theirs = names.checkpoint_name(OwnName(name, part))
            assert theirs is not None
            assert names.rename([theirs]).sources == {OwnName(name, part): [theirs]}


def test_the_record() -> None:
    assert len(ARCHITECTURES) == 1
    assert ARCHITECTURES[0] is llama_arch
    assert llama_arch.name == "LlamaForCausalLM"
    assert llama_arch.multi_gpu_supported
