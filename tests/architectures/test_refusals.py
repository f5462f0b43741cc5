"""What a family cannot do is refused before a weight is read, with a sentence that names the number in config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures.modern_bert.model_config import ModernBertConfig
from max_ray.config import PipelineConfig
from max_ray.conformance.suite import Suite
from max_ray.distributed import TPGroup
from max_ray.engine.kv_storage import KVStorage
from max_ray.errors import ConfigError, MaxRayError, ModelPathError, ParallelismError, WeightsError
from max_ray.huggingface import HuggingFaceConfig, load_huggingface_config
from max_ray.interfaces import SupportedEncoding
from max_ray.planning.plan import resolve_plan
from max_ray.registry import PIPELINE_REGISTRY
from tests.architectures.families import find_tiny, make_tiny, tiny_config

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Qwen2", {"hidden_act": "relu2"}, "hidden_act='relu2'"),
    ("Qwen3", {"num_hidden_layers": None}, "no 'num_hidden_layers'"),
    ("Qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is None"),
    ("Ministral", {"layer_types": ["full_attention"] * 2}, "names 2 layers, num_hidden_layers is 3"),
    ("Ministral", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention'"),
    ("Mistral", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
    ("Gemma 3", {"hidden_activation": "mish"}, "hidden_activation='mish'"),
    ("Gemma 3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("Gemma 3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("Mixtral", {"num_local_experts": None}, "no 'num_local_experts'"),
    ("Qwen3 MoE", {"moe_intermediate_size": None}, "no 'moe_intermediate_size'"),
    (
        "gpt-oss",
        {"quantization_config": {"quant_method": "hqq"}},
        "quant_method='hqq'; those that can be read: .*mxfp4",
    ),
    ("gpt-oss", {"num_local_experts": None}, "no 'num_local_experts'"),
    ("DeepSeek V2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
    ("DeepSeek V2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ("DeepSeek V2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("DeepSeek V3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("DeepSeek V3", {"n_group": 3}, "n_routed_experts=8 .* n_group=3"),
    ("DeepSeek V3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ("DeepSeek V3", {"mlp_bias": True}, "mlp_bias"),
    ("Qwen3", {"is_causal": False}, "is_causal=false"),
]
NOT_CUT: list[tuple[str, dict[str, Any], int, str]] = [
    ("Qwen3", {}, 3, r"num_attention_heads=4 .* sizes that work: 1, 2, 4"),
    ("Mistral", {"intermediate_size": 66}, 4, "intermediate_size=66 .* sizes that work: 1, 2"),
    ("Gemma 3", {"num_attention_heads": 12, "num_key_value_heads": 3}, 2, "num_key_value_heads=3 .* work: 1"),
    ("Qwen3 MoE", {"moe_intermediate_size": 18}, 4, "moe_intermediate_size=18"),
    ("Qwen3 MoE, some layers dense", {"intermediate_size": 34}, 4, "intermediate_size=34"),
    ("DeepSeek V3", {"moe_intermediate_size": 18}, 4, "moe_intermediate_size=18"),
    ("DeepSeek V3", {"num_attention_heads": 6}, 4, "num_attention_heads=6"),
]


OF_WHOLE_HEADS = [
    *("Llama 3", "Qwen2", "Qwen3", "Mistral", "Ministral", "Gemma 3", "Mixtral", "Qwen3 MoE", "gpt-oss"),
    *("DeepSeek V2", "DeepSeek V3"),
]


def config_folder(path: Path, name: str, changes: dict[str, Any]) -> Path:
    """A folder with config.json and nothing else."""
    values = tiny_config(find_tiny(name)).to_dict()
    values = {**values, "architectures": [find_tiny(name).class_name], **changes}
    (path / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_a_config_that_the_family_lacks(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    config = PipelineConfig(model_path=str(config_folder(tmp_path, name, changes)), devices="cpu")
    with pytest.raises(ConfigError, match=message):
        resolve_plan(config)


@pytest.mark.parametrize("name", OF_WHOLE_HEADS)
def test_heads_that_are_turned_in_part(tmp_path: Path, name: str) -> None:
    """transformers has no `partial_rotary_factor` in these classes: it turns whole heads, or fails."""
    config = PipelineConfig(
        model_path=str(config_folder(tmp_path, name, {"partial_rotary_factor": 0.5})), devices="cpu"
    )
    with pytest.raises(ConfigError, match=r"partial_rotary_factor=0\.5"):
        resolve_plan(config)
    file = config_folder(tmp_path, name, {"partial_rotary_factor": 1.0}) / "config.json"
    with pytest.raises(ModelPathError, match="has no weights"):
        resolve_plan(config)
    values = json.loads(file.read_text())
    nested = values.get("rope_parameters") or {}
    nested.get("full_attention", nested)["partial_rotary_factor"] = 0.25
    file.write_text(json.dumps({**values, "rope_parameters": nested}))
    with pytest.raises(ConfigError, match=r"partial_rotary_factor=0\.25"):
        resolve_plan(config)


@pytest.mark.parametrize(("name", "changes", "num_ranks", "message"), NOT_CUT)
def test_ranks_that_cannot_cut_it(
    tmp_path: Path, name: str, changes: dict[str, Any], num_ranks: int, message: str
) -> None:
    path = config_folder(tmp_path, name, changes)
    config = PipelineConfig(model_path=str(path), devices="cpu", tensor_parallel_size=num_ranks)
    with pytest.raises(ParallelismError, match=message):
        resolve_plan(config)


def test_an_encoding_that_the_family_lacks(tmp_path: Path) -> None:
    path = config_folder(tmp_path, "gpt-oss", {})
    with pytest.raises(MaxRayError, match="GptOssForCausalLM does not support quantization_encoding=q4_k"):
        resolve_plan(PipelineConfig(model_path=str(path), devices="cpu", quantization_encoding="q4_k"))


def test_defaults_of_a_checkpoint_that_says_little() -> None:
    """Where config.json is silent, the numbers are those of transformers' configuration classes."""
    least: dict[str, Any] = {
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 4,
        "num_hidden_layers": 7,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }

    def config_of(name: str, **values: Any) -> Any:
        model = PIPELINE_REGISTRY.retrieve_architecture(name).pipeline_model
        return model.config_of(HuggingFaceConfig({**least, **values}))  # type: ignore[attr-defined]

    assert config_of("Qwen3ForCausalLM").head_dim == 128
    assert config_of("Qwen2ForCausalLM").head_dim == 4
    assert config_of("Qwen2ForCausalLM").windows == (None,) * 7
    assert config_of("MistralForCausalLM").windows == (4096,) * 7
    assert config_of("MistralForCausalLM", sliding_window=None).windows == (None,) * 7
    gemma = config_of("Gemma3ForCausalLM", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert gemma.windows == (4096,) * 5 + (None, 4096)
    assert (gemma.rope.theta, gemma.global_rope.theta, gemma.global_rope.scaling) == (1e4, 1e6, {"factor": 8.0})
    assert (gemma.rope.rope_type, gemma.tie_word_embeddings, gemma.attention_scale) == ("default", True, 256**-0.5)
    mixtral = config_of("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2)
    assert (mixtral.tie_word_embeddings, mixtral.rope.theta) == (False, 1e6)
    oss = config_of("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2)
    assert (oss.rope.theta, oss.rope.rope_type, oss.rope.scaling["factor"]) == (150_000.0, "yarn", 32.0)
    latent = {"kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 16}
    deepseek = config_of("DeepseekV3ForCausalLM", **latent, num_experts_per_tok=2, moe_intermediate_size=4)
    assert (deepseek.routing.num_groups, deepseek.routing.num_groups_kept) == (8, 4)
    assert ModernBertConfig.from_huggingface(HuggingFaceConfig(least)).reach == 64
    assert ModernBertConfig.from_huggingface(HuggingFaceConfig({**least, "sliding_window": 3})).reach == 3


def test_a_mistral_with_layer_types_is_a_ministral() -> None:
    """As transformers reads it: a window where `layer_types` says so, and not in all layers."""
    config = tiny_config(find_tiny("Ministral")).to_dict()
    model = PIPELINE_REGISTRY.retrieve_architecture("MistralForCausalLM").pipeline_model
    assert model.config_of(HuggingFaceConfig(config)).windows == (None, 5, 5)  # type: ignore[attr-defined]


def test_gemma_ropes_that_are_said_in_both_ways() -> None:
    """`rope_parameters` by kind of layer are completed by the names of before; `rope_scaling` goes first."""
    config = tiny_config(find_tiny("Gemma 3")).to_dict()
    kinds = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    config |= {"rope_parameters": kinds, "rope_theta": 300.0, "rope_local_base_freq": 20.0}
    config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    model = PIPELINE_REGISTRY.retrieve_architecture("Gemma3ForCausalLM").pipeline_model
    gemma = model.config_of(HuggingFaceConfig(config))  # type: ignore[attr-defined]
    assert (gemma.rope.theta, gemma.rope.rope_type) == (20.0, "default")
    assert (gemma.global_rope.theta, gemma.global_rope.rope_type) == (300.0, "linear")


def test_a_tied_checkpoint_with_another_head(tmp_path: Path) -> None:
    """transformers would use that head, so it is not dropped in silence; a copy of the embedding is."""
    path = make_tiny(find_tiny("Qwen2, sliding window, tied"), tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path / "model.safetensors")
    assert load(path).network is not None
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, path / "model.safetensors")
    with pytest.raises(WeightsError, match="the checkpoint has a head of its own"):
        load(path)


def load(path: Path) -> Any:
    architecture = PIPELINE_REGISTRY.retrieve_architecture(load_huggingface_config(path).architecture_names[0])
    return Suite(architecture, path, lambda sequences: []).load(TPGroup.single(), SupportedEncoding.float32)


@pytest.mark.parametrize(
    ("name", "changes", "num_ranks", "message"),
    [
        ("Qwen3", {}, 2, "this family has no experts that can be spread"),
        ("gpt-oss", {}, 2, "this family has no experts that can be spread"),
        ("Mixtral", {"num_local_experts": 3}, 2, "3 experts cannot be spread evenly over tensor_parallel_size=2"),
    ],
)
def test_experts_that_cannot_be_spread(
    tmp_path: Path, name: str, changes: dict[str, Any], num_ranks: int, message: str
) -> None:
    path = config_folder(tmp_path, name, changes)
    with pytest.raises(ConfigError, match=message):
        resolve_plan(
            PipelineConfig(model_path=str(path), devices="cpu", tensor_parallel_size=num_ranks, expert_parallel=True)
        )


@pytest.mark.parametrize(("num_ranks", "encoding", "itemsize"), [(1, "bfloat16", 2), (2, "float32", 4)])
def test_deepseek_caches_the_latent_and_not_the_heads(
    tmp_path: Path, num_ranks: int, encoding: str, itemsize: int
) -> None:
    """A token costs one latent (24) and one rope key (8) a layer on each rank; heads would cost 4 * (20 + 10)."""
    path = config_folder(tmp_path, "DeepSeek V3", {})
    model = PIPELINE_REGISTRY.retrieve_architecture("DeepseekV3ForCausalLM").pipeline_model
    config = PipelineConfig(model_path=str(path), kv_cache_page_size=4)
    huggingface_config = load_huggingface_config(path)
    params = model.get_kv_params(config, huggingface_config, SupportedEncoding(encoding), num_ranks)
    assert params.bytes_per_token == 3 * (24 + 8) * itemsize
    storage = KVStorage.allocate(params, 5, torch.device("cpu"))
    held = sum(tensor.nbytes for tensor in [*storage.keys, *storage.values])
    assert held == params.bytes_per_block * (5 + 1)  # one block is scratch
