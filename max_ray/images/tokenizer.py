"""ImageTextTokenizer: a TextTokenizer whose chat messages may hold images.

    messages -> the chat template writes one placeholder token an image -> each becomes as many as the image has tokens

Images are read, decoded and resized in threads of their own, a few at a time: a decoded image may take hundreds of MB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from max_ray.errors import ConfigError, InputError
from max_ray.huggingface import HuggingFaceConfig, load_huggingface_config
from max_ray.images.decode import decode_image
from max_ray.images.limits import ImageLimits
from max_ray.images.processor import ImageProcessor
from max_ray.images.references import read_image
from max_ray.interfaces import PromptImage, TextGenerationRequest
from max_ray.tokenization.tokenizer import TextTokenizer, TokenArray

_NUM_THREADS = 2
_VISION_MERGE, _VISION_PATCH = "spatial_merge_size", "patch_size"


class ImageTextTokenizer(TextTokenizer):
    """Tokenizer of a vision-language model's folder. Raises ConfigError where it does not say how images are resized.

    image_limits: what one request may ask for.
    """

    takes_images = True

    def __init__(self, model_path: str | Path, *, image_limits: ImageLimits | None = None, **options: Any) -> None:
        super().__init__(model_path, **options)
        folder = Path(model_path)
        config = load_huggingface_config(folder)
        vision = _vision_config(config, folder)
        self.image_limits = image_limits or ImageLimits()
        self.processor = ImageProcessor.from_folder(folder, vision[_VISION_PATCH], vision[_VISION_MERGE])
        self.image_token_id = int(config.image_token_id)
        self._video_token_id = config.get("video_token_id")
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="images")

    async def _prompt(self, request: TextGenerationRequest) -> tuple[TokenArray, tuple[PromptImage, ...]]:
        if not request.messages:
            ids, images = await self._encode_prompt(request), tuple(request.images)
        else:
            ids, images = await self._chat_prompt(request)
        self._check_placeholders(ids, images)
        return self._check_prompt(ids, request), images

    async def _chat_prompt(self, request: TextGenerationRequest) -> tuple[TokenArray, tuple[PromptImage, ...]]:
        messages, urls = _without_images(request.messages)
        if len(urls) > self.image_limits.max_images:
            raise InputError(
                f"The messages hold {len(urls)} images, and a request may have {self.image_limits.max_images} "
                f"(--max-images). Send fewer.",
                param="messages",
            )
        loaded: list[PromptImage] = []
        if urls:
            loaded = await asyncio.get_running_loop().run_in_executor(self._threads, self._load, urls)
        ids = await self._encode_prompt(replace(request, messages=messages))
        return self._expand(ids, loaded)

    def _load(self, urls: Sequence[str]) -> list[PromptImage]:
        limits = self.image_limits
        return [self.processor.process(decode_image(read_image(url, limits), limits)) for url in urls]

    def _expand(self, ids: TokenArray, loaded: Sequence[PromptImage]) -> tuple[TokenArray, tuple[PromptImage, ...]]:
        """Each placeholder token of the template as often as its image has tokens."""
        places = np.flatnonzero(ids == self.image_token_id)
        if len(places) != len(loaded):
            raise InputError(
                f"The rendered prompt has {len(places)} image placeholders for {len(loaded)} images: leave "
                f"{self.token_piece(self.image_token_id)!r} out of the text.",
                param="messages",
            )
        counts = np.ones(len(ids), dtype=np.int64)
        counts[places] = [image.num_tokens for image in loaded]
        starts = (np.cumsum(counts) - counts)[places].tolist()
        images = tuple(replace(image, start=start) for image, start in zip(loaded, starts, strict=True))
        return np.repeat(ids, counts), images

    def _check_placeholders(self, ids: TokenArray, images: Sequence[PromptImage]) -> None:
        """Raises InputError unless the placeholder tokens are exactly those of the images."""
        is_image = ids == self.image_token_id
        for image in images:
            if image.end > len(ids) or not is_image[image.start : image.end].all():
                raise InputError("The prompt's tokens are not those that its images were placed in.", param="prompt")
            is_image[image.start : image.end] = False
        if is_image.any():
            raise InputError(
                f"The prompt has the token {self.token_piece(self.image_token_id)!r}, which stands for an image: send "
                f"images as image_url parts of chat messages.",
                param="prompt",
            )
        if self._video_token_id is not None and (ids == self._video_token_id).any():
            raise InputError("Videos are not supported: send single frames as images.", param="prompt")

    def _content(self, content: Any, wrap: bool) -> Any:
        """Parts stay parts: a template for images knows them, and writes the placeholders."""
        return content if isinstance(content, list) else super()._content(content, wrap)


def _vision_config(config: HuggingFaceConfig, folder: Path) -> dict[str, int]:
    vision = config.get("vision_config") or {}
    sizes = {name: vision[name] for name in (_VISION_PATCH, _VISION_MERGE) if isinstance(vision.get(name), int)}
    if len(sizes) < 2 or min(sizes.values()) < 1 or not isinstance(config.get("image_token_id"), int):
        raise ConfigError(
            f"{folder}: config.json must have image_token_id, and {_VISION_PATCH} and {_VISION_MERGE} in vision_config."
        )
    return sizes


def _without_images(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages with {"type": "image"} in place of each image_url part, and the URLs in order."""
    urls: list[str] = []

    def plain(part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type") != "image_url":
            return _refuse_other(part)
        urls.append(_url_of(part))
        return {"type": "image"}

    stripped = []
    for message in messages:
        content, before = message.get("content"), len(urls)
        parts = [plain(part) for part in content] if isinstance(content, list) else content
        if len(urls) > before and message.get("role") != "user":
            raise InputError("Images belong into messages of the role 'user'.", param="messages")
        stripped.append({**message, "content": parts})
    return stripped, urls


def _url_of(part: Mapping[str, Any]) -> str:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    if not isinstance(url, str):
        raise InputError('An image part is {"type": "image_url", "image_url": {"url": "data:..."}}.', param="messages")
    return url


def _refuse_other(part: Any) -> Any:
    """A part that is no image, as it is. Raises InputError for what the chat template would read as one."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("video", "video_url"):
        raise InputError("Videos are not supported: send single frames as images.", param="messages")
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InputError("Message content is a text, or a list of text and image_url parts.", param="messages")
    return {"type": "text", "text": part["text"]}
