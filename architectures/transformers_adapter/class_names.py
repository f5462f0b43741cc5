"""Which class of `transformers` a config.json means that names it otherwise, or does not name it.

A folder that was saved without the head that it is trained for names the network under it (`Qwen3Model`); one of an
encoder may name the head of its pre-training (`BertForMaskedLM`); one that a program wrote may name nothing. Published
checkpoints name classes of their own code where `transformers` has the same network under another name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

PUBLISHED: Mapping[tuple[str, str], str] = {
    ("InternLM3ForCausalLM", "internlm3"): "LlamaForCausalLM",
    ("InternLM3Model", "internlm3"): "LlamaForCausalLM",
    ("LLaMAForCausalLM", "llama"): "LlamaForCausalLM",
    ("MiniCPMForCausalLM", "minicpm"): "GraniteForCausalLM",
    ("Step3p5ForCausalLM", "step3p5"): "Step3p7ForConditionalGeneration",
    ("KimiK25ForConditionalGeneration", "kimi_k25"): "Kimi_K25ForConditionalGeneration",
    ("NewModel", "new"): "GteModel",
    ("NewForMaskedLM", "new"): "GteModel",
    ("XLMRobertaLoRA", "xlm-roberta"): "JinaEmbeddingsV3Model",
    ("XLMRobertaModel", "jina_embeddings_v3"): "JinaEmbeddingsV3Model",
}
"""(class name, model_type) of a checkpoint -> the class of `transformers` with the same network."""


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Classes of `transformers` for a config.json none of whose names is known, the most likely one first. None for a
    name that says another head (a classifier's), or an unknown class."""
    return tuple(dict.fromkeys(_class_names(config)))


def _class_names(config: Mapping[str, Any]) -> Iterator[str]:
    model_type = str(config.get("model_type") or "")
    given = list(config.get("architectures") or [])
    if not given:
        yield from _of_the_kind(model_type)
    for name in given:
        if (name, model_type) in PUBLISHED:
            yield PUBLISHED[name, model_type]
            continue
        for kind in [model_type] if model_type in MODEL_MAPPING_NAMES else _kinds_of(name):
            if name in _base_names(kind):
                yield from _of_the_kind(kind)
            elif name in _pretraining_names(kind):
                yield from _base_names(kind)


def _kinds_of(base_name: str) -> list[str]:
    """The model types whose network is called so, for a config.json that has none."""
    return [kind for kind in MODEL_MAPPING_NAMES if base_name in _base_names(kind)]


def _of_the_kind(model_type: str) -> Iterator[str]:
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if isinstance(causal, str) and "ConditionalGeneration" not in causal and not _pretraining_names(model_type):
        yield causal
    yield from _base_names(model_type)


def _base_names(model_type: str) -> tuple[str, ...]:
    names: Any = MODEL_MAPPING_NAMES.get(model_type) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _pretraining_names(model_type: str) -> set[str]:
    """The heads that an encoder is trained with; none for a decoder."""
    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type)
    if masked is None:
        return set()
    return {str(masked), str(MODEL_FOR_PRETRAINING_MAPPING_NAMES.get(model_type, masked))}
