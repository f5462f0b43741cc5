"""Resizing, normalising and cutting into patches, against transformers' own processor for the family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from architectures.qwen3_vl.model_config import VisionConfig
from architectures.qwen3_vl.vision import patches_of
from max_ray.errors import ConfigError, InputError
from max_ray.images.processor import ImageProcessor
from tests.architectures.vision import MERGE, PATCH, PROCESSOR, our_processor, picture, their_processor

SIZES = [(40, 24), (8, 8), (1, 1), (7, 90), (200, 3), (333, 250), (16, 16), (64, 40), (41, 25)]
TOWER = VisionConfig(3, 32, 48, 2, PATCH, 2, MERGE, 32, 5, (0, 2), "tanh", 10_000.0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_are_those_of_transformers(size: tuple[int, int]) -> None:
    image = picture(*size)
    theirs = their_processor()([image], return_tensors="pt")
    ours = our_processor().process(image)
    pixels = torch.from_numpy(ours.pixels).float() * torch.from_numpy(ours.scale) + torch.from_numpy(ours.shift)
    patches = patches_of(pixels, TOWER)
    assert theirs["image_grid_thw"].tolist() == [[1, ours.rows * MERGE, ours.columns * MERGE]]
    assert patches.shape == theirs["pixel_values"].shape
    assert float((patches - theirs["pixel_values"]).abs().max()) < 1e-6


def test_sizes_are_those_of_transformers() -> None:
    generator = np.random.default_rng(0)
    processor = ImageProcessor(token_pixels=32, min_pixels=65_536, max_pixels=1_000_000)
    for height, width in generator.integers(1, 3000, (500, 2)).tolist():
        if max(height, width) <= 200 * min(height, width):
            theirs = smart_resize(height, width, factor=32, min_pixels=65_536, max_pixels=1_000_000)
            assert processor.resized(height, width) == theirs


def test_a_strip_is_refused() -> None:
    with pytest.raises(InputError, match="more than 200 times"):
        our_processor().process(picture(1, 201))


def test_digests_tell_pixels_and_shapes_apart() -> None:
    black = [Image.new("RGB", size) for size in ((16, 32), (32, 16), (16, 32))]
    first, turned, same = (our_processor().process(image).digest for image in black)
    assert first == same != turned
    assert our_processor().process(picture(16, 32)).digest != first


@pytest.mark.parametrize("nested", [False, True])
def test_the_file_that_transformers_writes(tmp_path: Path, nested: bool) -> None:
    values = json.loads(Qwen2VLImageProcessorPil(**PROCESSOR).to_json_string())
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": values} if nested else values))
    read = ImageProcessor.from_folder(tmp_path, PATCH, MERGE)
    assert (read.min_pixels, read.max_pixels) == (our_processor().min_pixels, our_processor().max_pixels)
    assert read.mean == our_processor().mean
    assert read.std == our_processor().std


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"do_resize": False}, "do_resize=false"),
        ({"resample": 2}, "resample=2"),
        ({"patch_size": 14}, "patch_size=14"),
        ([], "no preprocessor_config.json"),
        (None, "no preprocessor_config.json"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_said(tmp_path: Path, values: Any, sentence: str) -> None:
    if values is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=sentence):
        ImageProcessor.from_folder(tmp_path, PATCH, MERGE)


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ImageProcessor.from_folder(tmp_path, PATCH, MERGE)
