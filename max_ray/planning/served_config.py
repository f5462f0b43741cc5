"""config.json as what is served has it: its own, or that of the text network of a multimodal repository. No torch."""

from __future__ import annotations

from pathlib import Path

from max_ray.config import PipelineConfig
from max_ray.huggingface import HuggingFaceConfig, load_huggingface_config
from max_ray.log import get_logger
from max_ray.planning.checkpoint import TEXT_PART_OF
from max_ray.registry import PIPELINE_REGISTRY
from max_ray.weights import open_weights
from max_ray.weights.text_part import TextPart

_LOG = get_logger(__name__)
_HEAD = "lm_head."


def served_config(
    config: PipelineConfig, model_dir: Path, override_architecture: str | None = None
) -> HuggingFaceConfig:
    """Reads config.json, and for a text network the headers of the weights; says in the log what is left out.

    override_architecture: a family that gets config.json as it is. Raises ConfigError, ModelPathError and WeightsError
    for files that cannot be used."""
    whole = load_huggingface_config(model_dir)
    if override_architecture is not None:
        return whole
    served = PIPELINE_REGISTRY.served_config(whole, config.custom_architectures)
    if served is whole:
        return whole
    part = TextPart(open_weights(model_dir))
    _LOG.info(
        "%s: its text network alone is served; the %d tensors of what sees images or hears are not loaded, and "
        "requests with images are refused",
        served.get(TEXT_PART_OF),
        len(part.towers),
    )
    return _with_head_of(part, served)


def _with_head_of(part: TextPart, served: HuggingFaceConfig) -> HuggingFaceConfig:
    """Tied where the checkpoint stores no head: config.json of the whole and its `text_config` may say it differently,
    and versions of transformers do not agree which one counts."""
    tied = not any(name.startswith(_HEAD) for name in part.names())
    return HuggingFaceConfig({**served.to_dict(), "tie_word_embeddings": tied}, "config.json: text_config")
