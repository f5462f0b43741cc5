"""ImageProcessor: resizes an image so that its patches fill whole placeholder tokens, as transformers does it for the
Qwen-VL families (`Qwen2VLImageProcessor`, Pillow backend). Normalising and cutting into patches is left to the worker:
resized bytes are an eighth of what the float32 patches of two equal frames would be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from max_ray.errors import ConfigError, InputError
from max_ray.interfaces import PromptImage

_MAX_ASPECT_RATIO = 200
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the class's own defaults, for what the file leaves out
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MUST_BE_TRUE = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


@dataclass(frozen=True)
class ImageProcessor:
    """The numbers of preprocessor_config.json.

    token_pixels: height and width in pixels of what one placeholder token stands for (patch size times merge size).
    min_pixels, max_pixels: of the resized image. mean, std: of channels whose values lie between 0 and 1.
    """

    token_pixels: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...] = _CLIP_MEAN
    std: tuple[float, ...] = _CLIP_STD
    rescale_factor: float = 1 / 255

    @classmethod
    def from_folder(cls, folder: Path, patch_size: int, merge_size: int) -> ImageProcessor:
        """From a model folder's preprocessor_config.json, or the part of processor_config.json that takes its place.

        patch_size, merge_size: as config.json has them. Raises ConfigError for what this class does not do.
        """
        values = _read(folder)
        for name in _MUST_BE_TRUE:
            if values.get(name) is False:
                raise ConfigError(f"{folder}: {name}=false in preprocessor_config.json is not supported.")
        if values.get("resample", 3) not in (3, "bicubic"):
            raise ConfigError(f"{folder}: preprocessor_config.json asks for resample={values['resample']!r}, not 3.")
        for name, wanted in (("patch_size", patch_size), ("merge_size", merge_size)):
            if values.get(name, wanted) != wanted:
                raise ConfigError(
                    f"{folder}: preprocessor_config.json has {name}={values[name]!r}, config.json {wanted}."
                )
        size = values.get("size") or {}
        return cls(
            token_pixels=patch_size * merge_size,
            min_pixels=values.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
            max_pixels=values.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280,
            mean=tuple(values.get("image_mean") or _CLIP_MEAN),
            std=tuple(values.get("image_std") or _CLIP_STD),
            rescale_factor=values.get("rescale_factor") or 1 / 255,
        )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in multiples of `token_pixels`, of nearly the same ratio, whose product lies between
        `min_pixels` and `max_pixels` where that is possible. Raises InputError for a strip."""
        if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
            raise InputError(
                f"An image of {width} x {height} pixels is more than {_MAX_ASPECT_RATIO} times as long as wide: "
                f"crop it.",
                param="messages",
            )
        unit = self.token_pixels
        tall, wide = round(height / unit) * unit, round(width / unit) * unit
        if tall * wide > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            tall, wide = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
        elif tall * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            tall, wide = (math.ceil(side * grow / unit) * unit for side in (height, width))
        return tall, wide

    def process(self, image: Image.Image, start: int = 0) -> PromptImage:
        """An RGB image, ready for a prompt whose token `start` is its first placeholder. Raises InputError."""
        height, width = self.resized(image.height, image.width)
        pixels = np.array(image.resize((width, height), resample=Image.Resampling.BICUBIC))
        mean, std = np.array(self.mean), np.array(self.std)
        digest = blake2b(pixels.tobytes(), digest_size=16, person=b"max_ray image", salt=b"%dx%d" % (height, width))
        return PromptImage(
            pixels=pixels,
            scale=(self.rescale_factor / std).astype(np.float32),
            shift=(-mean / std).astype(np.float32),
            start=start,
            rows=height // self.token_pixels,
            columns=width // self.token_pixels,
            digest=digest.digest(),
        )


def _read(folder: Path) -> Mapping[str, Any]:
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file} is not valid JSON: {error}") from None
        values = values.get(part) if part is not None and isinstance(values, dict) else values
        if isinstance(values, dict):
            return values
    raise ConfigError(f"{folder} has no preprocessor_config.json, which says how images are resized for this model.")
