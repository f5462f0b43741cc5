"""Images through worker actors on two ranks: the tokens are those of transformers, and equal images are found in the
prefix cache."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from max_ray.config import ServeConfig
from max_ray.interfaces import RequestID, TextGenerationRequest
from max_ray.pipelines import PIPELINE_REGISTRY
from max_ray.serve.application import build_application
from tests.actors.helpers import actors_of, eventually
from tests.architectures.vision import DENSE, Prompt, VisionReference, make_served_vision, picture
from tests.images.test_loading import data_url, encoded
from tests.serve.applications import running
from tests.serve.conftest import Served, settings_for

pytestmark = [pytest.mark.ray]

NUM_NEW = 8
PICTURES = [picture(40, 24), picture(17, 70), picture(40, 24, seed=1)]


def messages(*pictures: Image.Image) -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_url(encoded(each))}} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


async def expected(config: ServeConfig, *pictures: Image.Image) -> str:
    """What transformers generates greedily; the end of sequence ends the text."""
    tokenizer = PIPELINE_REGISTRY.retrieve_tokenizer(config)
    context = await tokenizer.new_context(TextGenerationRequest(RequestID(), "tiny", messages=messages(*pictures)))
    reference = VisionReference(Path(config.model_path), DENSE)
    tokens = reference.greedy(Prompt(context.tokens.prompt.tolist(), pictures), NUM_NEW)
    tokens = tokens[: tokens.index(tokenizer.eos)] if tokenizer.eos in tokens else tokens
    text: str = tokenizer.decode_ids(tokens, True)
    return text


async def said(served: Served, *pictures: Image.Image) -> tuple[str, int]:
    """The answer's text, and how many tokens of the prompt were in the prefix cache."""
    answer = await served.client().chat.completions.create(
        model="tiny", messages=messages(*pictures), max_tokens=NUM_NEW, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.choices[0].message.content or "", answer.usage.prompt_tokens_details.cached_tokens or 0


@pytest.mark.slow
async def test_images_reach_the_workers(ray_cluster: Any, tmp_path: Path, serve_port: int) -> None:
    model = make_served_vision(DENSE, tmp_path / "model")
    code = ("architectures.qwen3_vl",)
    config = ServeConfig(
        **settings_for(model, serve_port, "images", custom_architectures=code, tensor_parallel_size=2, max_images=2)
    )
    cases = [(PICTURES[0],), (PICTURES[1],), (PICTURES[2], PICTURES[0]), ()]
    texts = [await expected(config, *case) for case in cases]
    assert len(set(texts)) > 1
    async with running(build_application(config), serve_port, "images") as served:
        answers = await asyncio.gather(*[said(served, *case) for case in cases])
        assert [text for text, _ in answers] == texts
        assert (await said(served, *cases[2]))[1] >= 32  # both images, of 15 tokens each
        with pytest.raises(openai.BadRequestError, match="a request may have 2"):
            await said(served, *PICTURES)
    await eventually(lambda: not actors_of("images"), 20, "the group ends with its application")
