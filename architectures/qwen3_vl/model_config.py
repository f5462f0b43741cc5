"""VisionConfig and MropeConfig: what a Qwen3-VL has beside its text model, read once from config.json and frozen; and
the part of config.json that the text model is read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError
from max_ray.huggingface import HuggingFaceConfig, required, required_list

_ACTIVATIONS = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}
_DEFAULTS = {"max_position_embeddings": 128_000}  # of the text model, where config.json leaves them out
_DEFAULT_THETA = 500_000.0
_DEFAULT_SECTION = (24, 20, 20)
_RGB = 3


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of the vision tower.

    patch_size: pixels in a patch's side; num_frames: equal frames that a patch of a still image is made of.
    merge_size: patches in the side of what becomes one token. grid_side: of the square grid of learned position
    embeddings. deepstack_layers: layers whose outputs go to the first layers of the text model. gelu: "tanh" or "none",
    as torch names the two.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    num_frames: int
    merge_size: int
    out_size: int
    grid_side: int
    deepstack_layers: tuple[int, ...]
    gelu: str
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_huggingface(cls, config: Any) -> VisionConfig:
        """From the whole config.json. Raises ConfigError for a value that this family lacks."""
        vision, text = required(config, "vision_config"), required(config, "text_config")
        activation = vision.get("hidden_act") or "gelu_pytorch_tanh"
        if activation not in _ACTIVATIONS:
            raise ConfigError(f"config.json: vision_config: hidden_act={activation!r} is not supported.")
        if (vision.get("in_channels") or _RGB) != _RGB:
            raise ConfigError(f"config.json: vision_config: in_channels={vision.in_channels} is not supported, 3 is.")
        made = cls(
            num_layers=required(vision, "depth"),
            hidden_size=required(vision, "hidden_size"),
            intermediate_size=required(vision, "intermediate_size"),
            num_heads=required(vision, "num_heads"),
            patch_size=required(vision, "patch_size"),
            num_frames=required(vision, "temporal_patch_size"),
            merge_size=required(vision, "spatial_merge_size"),
            out_size=required(vision, "out_hidden_size"),
            grid_side=int(required(vision, "num_position_embeddings") ** 0.5),
            deepstack_layers=tuple(sorted(required_list(vision, "deepstack_visual_indexes"))),
            gelu=_ACTIVATIONS[activation],
            rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta") or 10_000.0),
        )
        made._check(required(text, "hidden_size"), required(text, "num_hidden_layers"))
        return made

    def _check(self, text_size: int, num_text_layers: int) -> None:
        if self.out_size != text_size:
            raise ConfigError(f"config.json: out_hidden_size={self.out_size}, but the text model has {text_size}.")
        if self.hidden_size % (4 * self.num_heads):
            raise ConfigError(f"config.json: {self.num_heads} vision heads need a hidden_size in multiples of 4 each.")
        layers = self.deepstack_layers
        if len(layers) > num_text_layers or any(layer >= self.num_layers for layer in layers):
            raise ConfigError(f"config.json: deepstack_visual_indexes={list(layers)} does not fit the layers.")


def mrope_section(config: Any) -> tuple[int, int, int]:
    """How many pairs of a head turn with time, row and column, from the whole config.json. Raises ConfigError where the
    three are not interleaved."""
    text = required(config, "text_config")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    section = tuple(rope.get("mrope_section") or _DEFAULT_SECTION)
    if rope.get("mrope_interleaved") is False or len(section) != 3:
        raise ConfigError("config.json: mrope_section must be three numbers, and interleaved.")
    return section


def text_config(config: Any) -> HuggingFaceConfig:
    """The part of config.json that describes the text model, with the defaults of this family."""
    values = {**_DEFAULTS, **required(config, "text_config").to_dict()}
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not values.get("rope_theta") and not rope.get("rope_theta"):
        values["rope_theta"] = _DEFAULT_THETA
    values["tie_word_embeddings"] = bool(config.get("tie_word_embeddings"))
    return HuggingFaceConfig(values, "config.json: text_config")
