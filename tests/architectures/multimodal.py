"""Tiny random checkpoints of multimodal classes of `transformers`, in the layout of today and in that before 4.52."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.architectures.adapter_models import make_adapter_checkpoint, randomize, tiny_adapter_config

_VISION_SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "embed_dim": 32, "out_hidden_size": 32, "hidden_dim": 32},
    **{"num_hidden_layers": 1, "depth": 1, "num_attention_heads": 4, "num_heads": 4, "num_key_value_heads": 4},
    **{"image_size": 32, "patch_size": 8, "fullatt_block_indexes": [0], "head_dim": 8, "global_head_dim": 8},
    **{
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "layer_types": None,
        "position_embedding_size": 64,
    },
}
_SMALL_IDS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "boi_token_id", "boa_token_id")
_IDS = (*_SMALL_IDS, "eoi_token_id", "eoa_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Multimodal:
    """class_name: of the whole. text_class: of the causal model whose tiny sizes its text network gets. text, whole:
    further values of its parts. tower_alone: where the tower's code is not installed, a name of one of its tensors,
    which then stands for all of them. text_type: model_type of the text network, where it is not the default."""

    class_name: str
    model_type: str
    text_class: str
    text: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    tower_alone: str = ""
    text_type: str = ""


def make_multimodal(model: Multimodal, folder: Path, **whole: Any) -> Path:
    """Writes config.json and model.safetensors as transformers does today."""
    if model.tower_alone:
        return _around_a_text_network(model, folder, whole)
    network_class = getattr(transformers, model.class_name)
    config = multimodal_config(model, **whole)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = network_class(config).float().eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                randomize(name, parameter)
    network.save_pretrained(folder)
    return folder


def _around_a_text_network(model: Multimodal, folder: Path, whole: dict[str, Any]) -> Path:
    text = json.loads((make_adapter_checkpoint(model.text_class, folder, **model.text) / "config.json").read_text())
    file = folder / "model.safetensors"
    weights = {_name_in_the_whole(name): weight for name, weight in load_file(file).items()}
    save_file({**weights, model.tower_alone: torch.zeros(3)}, file, metadata={"format": "pt"})
    parts = {"architectures": [model.class_name], "model_type": model.model_type, "text_config": text}
    (folder / "config.json").write_text(json.dumps({**parts, **model.whole, **whole}))
    return folder


def _name_in_the_whole(name: str) -> str:
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def multimodal_config(model: Multimodal, **whole: Any) -> Any:
    """The configuration of the whole, its parts small."""
    config_class = CONFIG_MAPPING[model.model_type]
    default = config_class()
    text = tiny_adapter_config(model.text_class, **model.text).to_dict()
    for name in ("model_type", "architectures"):
        text.pop(name, None)
    text["model_type"] = model.text_type or default.text_config.model_type
    vision = default.vision_config or config_class.sub_configs["vision_config"]()
    parts: dict[str, Any] = {"text_config": text, "vision_config": _small(vision, _VISION_SIZES)}
    ids = {name: 140 + i for i, name in enumerate(_IDS) if getattr(default, name, None) is not None}
    return config_class(**{**parts, **ids, **model.whole, **whole})


def _small(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in config.to_dict().items() if name not in ("id2label", "label2id")}
    return values | {name: value for name, value in sizes.items() if name in values}


def find_multimodal(model_type: str) -> Multimodal:
    return next(model for model in MULTIMODAL if model.model_type == model_type)


def in_the_old_layout(folder: Path, model: Multimodal | None = None) -> Path:
    """Names as transformers before 4.52 wrote them, where it had the class then."""
    if model is not None and model.model_type in ("idefics3", "smolvlm"):
        return folder
    file = folder / "model.safetensors"
    save_file({_old_name(name): w for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def _old_name(name: str) -> str:
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model.language_model."):
        return f"language_model.model.{name.removeprefix('model.language_model.')}"
    return name.removeprefix("model.")


def change_config(folder: Path, **values: Any) -> Path:
    """config.json with other values; None takes one out."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


PER_LAYER = {"vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}}

MULTIMODAL = [
    Multimodal("Gemma3ForConditionalGeneration", "gemma3", "Gemma3ForCausalLM", whole={"tie_word_embeddings": False}),
    Multimodal("Gemma3nForConditionalGeneration", "gemma3n", "Gemma3nForCausalLM", tower_alone="model.vision_tower.w"),
    Multimodal("Gemma4ForConditionalGeneration", "gemma4", "Gemma4ForCausalLM", PER_LAYER),
    Multimodal("Mistral3ForConditionalGeneration", "mistral3", "MistralForCausalLM"),
    Multimodal("Mistral3ForConditionalGeneration", "mistral3", "Ministral3ForCausalLM", text_type="ministral3"),
    Multimodal("LlavaForConditionalGeneration", "llava", "LlamaForCausalLM"),
    Multimodal("LlavaNextForConditionalGeneration", "llava_next", "LlamaForCausalLM"),
    Multimodal("LlavaOnevisionForConditionalGeneration", "llava_onevision", "Qwen2ForCausalLM"),
    Multimodal("AyaVisionForConditionalGeneration", "aya_vision", "Cohere2ForCausalLM"),
    Multimodal("Cohere2VisionForConditionalGeneration", "cohere2_vision", "Cohere2ForCausalLM"),
    Multimodal("Idefics3ForConditionalGeneration", "idefics3", "LlamaForCausalLM"),
    Multimodal("SmolVLMForConditionalGeneration", "smolvlm", "LlamaForCausalLM"),
    Multimodal("InternVLForConditionalGeneration", "internvl", "Qwen2ForCausalLM"),
    Multimodal("LightOnOcrForConditionalGeneration", "lighton_ocr", "Qwen3ForCausalLM"),
    Multimodal("Exaone4_5_ForConditionalGeneration", "exaone4_5", "Exaone4ForCausalLM"),
    Multimodal("Qwen2VLForConditionalGeneration", "qwen2_vl", "Qwen2ForCausalLM", MROPE),
    Multimodal("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "Qwen2ForCausalLM", MROPE),
    Multimodal("Lfm2VlForConditionalGeneration", "lfm2_vl", "Lfm2ForCausalLM"),
    Multimodal("KimiK25ForConditionalGeneration", "kimi_k25", "DeepseekV3ForCausalLM", tower_alone="mm_projector.w"),
    Multimodal("Llama4ForConditionalGeneration", "llama4", "Llama4ForCausalLM"),
    Multimodal("Qwen3_5ForConditionalGeneration", "qwen3_5", "Qwen3_5ForCausalLM"),
    Multimodal("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", "Qwen3_5MoeForCausalLM"),
]

NOT_SERVED = ("lfm2_vl", "qwen3_5", "qwen3_5_moe")
SERVED = [model for model in MULTIMODAL if model.model_type not in NOT_SERVED and not model.tower_alone]
"""Those whose text network runs here, and whose whole `transformers` can build."""
