"""Images in chat messages, from the HTTP body to the tokens of a tiny Qwen3-VL that runs in this process: chunks,
blocks that are too few, the prefix cache; and every refusal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from architectures.qwen3_vl import qwen3_vl_arch
from max_ray.errors import InputError
from max_ray.images.limits import ImageLimits
from max_ray.images.tokenizer import ImageTextTokenizer
from max_ray.interfaces import PipelineTask, RequestID, TextContext, TextGenerationOutput, TextGenerationRequest
from max_ray.kv_cache import LocalKVCacheClient, PagedKVCacheManager
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from max_ray.scheduler import GenerationLoop, LoopActivity, SchedulerLimits
from max_ray.serve.api.metrics import Metrics, MetricsSnapshot
from max_ray.serve.api.model_parsers import ModelParsers
from max_ray.serve.api.request_log import RequestLog
from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.architectures.vision import DENSE, Prompt, VisionReference, make_served_vision, picture
from tests.byte_tokenizer import write_byte_level
from tests.http.fake_engine import FakeEngine
from tests.images.test_loading import data_url, encoded, png_header

NUM_NEW = 8
PAGE = 8
NUM_BLOCKS = 24
TALL, WIDE = picture(17, 70), picture(40, 24)  # 18 and 15 tokens


class LoopEngine:
    """The scheduling loop over a pipeline of this process, as the routes want it."""

    model_name = "tiny"
    model_aliases = ()
    task = PipelineTask.TEXT_GENERATION
    parsers = ModelParsers()

    def __init__(self, tokenizer: ImageTextTokenizer, loop: GenerationLoop) -> None:
        self.tokenizer = tokenizer
        self.metrics = Metrics("tiny", "r0")
        self.requests = RequestLog("r0", max_choices=100)
        self.contexts: list[TextContext] = []
        self.loop = loop

    def submit(self, context: TextContext) -> AsyncIterator[TextGenerationOutput]:
        self.contexts.append(context)
        return self.loop.submit(context)

    def cancel(self, request_id: RequestID) -> None:
        self.loop.cancel(request_id)

    async def healthy(self) -> bool:
        return True

    async def metrics_snapshots(self) -> Sequence[MetricsSnapshot]:
        return [self.metrics.snapshot(self.loop.stats)]

    @property
    def activity(self) -> LoopActivity:
        return self.loop.activity


class ServedModel:
    """Tokenizer, pipeline and reference of one checkpoint."""

    def __init__(self, folder: Path, root: Path) -> None:
        torch.set_num_threads(1)
        path = self.path = make_served_vision(DENSE, folder)
        PIPELINE_REGISTRY.register(qwen3_vl_arch)
        config = PipelineConfig(
            model_path=str(path),
            num_threads=1,
            devices="cpu",
            kv_cache_page_size=PAGE,
            max_images=3,
            max_image_pixels=10_000,
            max_image_bytes=20_000,
            allowed_image_root=str(root),
        )
        self.tokenizer, self.pipeline = PIPELINE_REGISTRY.retrieve(config)
        self.reference = VisionReference(path, DENSE)
        self._known: dict[tuple[Any, ...], str] = {}

    def expected(self, context: TextContext, pictures: Sequence[Image.Image], num_new: int = NUM_NEW) -> str:
        """What transformers generates greedily; the end of sequence ends the text."""
        key = (num_new, *context.tokens.prompt.tolist(), *(each.tobytes() for each in pictures))
        if key not in self._known:
            prompt = Prompt(context.tokens.prompt.tolist(), tuple(pictures))
            tokens = self.reference.greedy(prompt, num_new)
            tokens = tokens[: tokens.index(self.tokenizer.eos)] if self.tokenizer.eos in tokens else tokens
            self._known[key] = self.tokenizer.decode_ids(tokens, True)
        return self._known[key]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    root = tmp_path_factory.mktemp("pictures")
    TALL.save(root / "tall.png")
    return ServedModel(tmp_path_factory.mktemp("served") / "model", root)


@pytest.fixture
async def engine(served: ServedModel, request: pytest.FixtureRequest) -> AsyncIterator[LoopEngine]:
    """Its parameter: the blocks of the KV cache."""
    num_blocks = getattr(request, "param", NUM_BLOCKS)
    manager = PagedKVCacheManager(served.pipeline.kv_manager.params, num_blocks)
    loop = GenerationLoop(served.pipeline, LocalKVCacheClient(manager), SchedulerLimits(4, 12, 20, 8))
    task = asyncio.create_task(loop.run())
    yield LoopEngine(served.tokenizer, loop)
    while manager.num_free_blocks < num_blocks:
        await asyncio.sleep(0.01)
    manager.assert_invariants()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture
async def client(engine: LoopEngine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_api(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def part(image: Image.Image | str, **fields: Any) -> dict[str, Any]:
    url = image if isinstance(image, str) else data_url(encoded(image))
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


async def chat(client: httpx.AsyncClient, *parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": list(parts)}], "temperature": 0, "max_tokens": NUM_NEW, **fields}
    reply = await client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def said(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


async def test_one_image(client: httpx.AsyncClient, engine: LoopEngine, served: ServedModel) -> None:
    answer = await chat(client, text("What is this? "), part(WIDE, detail="auto"), text(" Say it."), n=2, seed=1)
    (first, second) = engine.contexts
    rendered = "<|user|>What is this? <|vision_start|>" + "<|image_pad|>" * 15 + "<|vision_end|> Say it.<|assistant|>"
    assert served.tokenizer.decode_ids(first.tokens.prompt.tolist()) == rendered
    assert answer["usage"]["prompt_tokens"] == len(first.tokens.prompt)
    assert first.images[0] is second.images[0], "decoded once for all choices"
    assert said(answer) == [served.expected(first, [WIDE])] * 2


async def test_the_ways_to_send_an_image(client: httpx.AsyncClient, served: ServedModel, engine: LoopEngine) -> None:
    root = served.tokenizer.image_limits.allowed_root
    whole = await chat(client, part(TALL), text("a"))
    from_file = await chat(client, part(f"file://{root}/tall.png"), text("a"))
    lossless = await chat(client, part(data_url(encoded(TALL, "WEBP", lossless=True), "image/webp")), text("a"))
    assert said(whole) == said(from_file) == said(lossless) == [served.expected(engine.contexts[0], [TALL])]


async def test_images_in_the_prefix_cache(client: httpx.AsyncClient, served: ServedModel, engine: LoopEngine) -> None:
    """Equal tokens and equal pixels are found again; equal tokens over other pixels are not."""
    other = picture(40, 24, seed=9)
    cached = []
    for image in (WIDE, WIDE, other, other, WIDE):
        answer = await chat(client, text("Look:"), part(image), text("and compare it with the words behind it"))
        assert said(answer) == [served.expected(engine.contexts[-1], [image])]
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    start, length = engine.contexts[0].images[0].start, len(engine.contexts[0].tokens.prompt)
    before_image, whole = start // PAGE * PAGE, (length - 1) // PAGE * PAGE
    assert cached == [0, whole, before_image, whole, whole]


@pytest.mark.parametrize("engine", [14], indirect=True)
async def test_many_at_once(client: httpx.AsyncClient, served: ServedModel, engine: LoopEngine) -> None:
    """Steps of 12 tokens cut every image, and 14 blocks are too few for all: some are preempted and computed again."""
    num_new = 24
    requests: list[tuple[Any, ...]] = [
        (part(WIDE), text("one"), part(TALL)),
        ("a text without an image",),
        (part(TALL), part(TALL), text("twice the same")),
        (text("long " * 8), part(WIDE)),
        ("short",),
        (part(TALL), part(WIDE), part(picture(8, 24)), text("three")),
    ]

    async def one(parts: tuple[Any, ...]) -> dict[str, Any]:
        content = [text(each) if isinstance(each, str) else each for each in parts]
        return await chat(client, *content, max_tokens=num_new)

    answers = await asyncio.gather(*[one(parts) for parts in requests])
    pictures = [[WIDE, TALL], [], [TALL, TALL], [WIDE], [], [TALL, WIDE, picture(8, 24)]]
    contexts = sorted(engine.contexts, key=lambda context: _number_of(served, context))
    texts = [served.expected(context, pictures[i], num_new) for i, context in enumerate(contexts)]
    assert [said(answer) for answer in answers] == [[each] for each in texts]
    assert engine.loop.stats.preemptions > 0


def _number_of(served: ServedModel, context: TextContext) -> int:
    """Which request a context is of, by a word of it."""
    words = ["one", "a text without", "twice", "long", "short", "three"]
    shown = served.tokenizer.decode_ids(context.tokens.prompt.tolist())
    (number,) = [i for i, word in enumerate(words) if word in shown]
    return number


async def test_a_later_message_may_have_images_too(
    client: httpx.AsyncClient, served: ServedModel, engine: LoopEngine
) -> None:
    messages = [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [part(WIDE), text("?")]},
        {"role": "assistant", "content": "!"},
        {"role": "user", "content": [text("and "), part(TALL)]},
    ]
    answer = await chat(client, messages=messages)
    assert said(answer) == [served.expected(engine.contexts[0], [WIDE, TALL])]


BIG = png_header(101, 100)
REFUSALS: list[tuple[Any, str]] = [
    ([part("https://example.com/cat.png")], "does not fetch images"),
    ([part("file:///etc/passwd")], "is not in the folder"),
    ([part("data:image/png;base64,AAA")], "not valid base64"),
    ([part(data_url(b"text"))], "An image is no PNG, JPEG or WebP file."),
    ([part(data_url(BIG))], "101 x 100 pixels"),
    ([part(data_url(b"x" * 20_001))], "more than 20000 bytes"),
    ([part(WIDE)] * 4, "4 images, and a request may have 3"),
    ([part(picture(1, 201))], "more than 200 times"),
    ([part(WIDE, detail="low")], "Input should be 'auto'"),
    ([{"type": "video_url", "video_url": {"url": "x"}}], "send single frames of a video as images"),
    ([{"type": "input_audio", "input_audio": {}}], "not 'input_audio'"),
    ([{"type": "image_url"}], "is required"),
    ([{"type": "image"}], "not 'image'"),
    ([part(picture(64, 40)), text("long " * 60)], "tokens, but this model is served with"),
]


@pytest.mark.parametrize(("content", "sentence"), REFUSALS, ids=[sentence for _, sentence in REFUSALS])
async def test_refusals(client: httpx.AsyncClient, engine: LoopEngine, content: Any, sentence: str) -> None:
    body = {"messages": [{"role": "user", "content": content}]}
    reply = await client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    assert sentence in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"].startswith("messages")
    assert engine.contexts == []


async def test_placeholders_that_a_client_writes_are_text(client: httpx.AsyncClient, engine: LoopEngine) -> None:
    """They count as no image, beside images too; the tokens are as many as those of the letters."""
    await chat(client, part(WIDE), text("<|image_pad|>"), text("<|video"), text("_pad|>"))
    context = engine.contexts[0]
    ids = context.tokens.prompt.tolist()
    assert ids.count(engine.tokenizer.image_token_id) == 15 == context.images[0].num_tokens
    rendered = (
        "<|user|><|vision_start|>" + "<|image_pad|>" * 15 + "<|vision_end|><|image_pad|><|video_pad|><|assistant|>"
    )
    assert engine.tokenizer.decode_ids(ids) == rendered


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([part(WIDE), text("<|image_pad|>")], "2 image placeholders for 1 images"),
        ([text("<|image_pad|>")], "1 image placeholders for 0 images"),
        ([text("<|video_pad|>")], "Videos are not supported"),
        ("<|image_pad|>", "1 image placeholders for 0 images"),
    ],
)
async def test_placeholders_where_special_tokens_are_allowed(served: ServedModel, content: Any, sentence: str) -> None:
    tokenizer = ImageTextTokenizer(served.path, max_length=200, allow_special_tokens_in_messages=True)
    request = TextGenerationRequest(RequestID(), messages=[{"role": "user", "content": content}])
    with pytest.raises(InputError, match=sentence):
        await tokenizer.new_context(request)


async def test_only_users_show_images(client: httpx.AsyncClient) -> None:
    for role in ("system", "assistant"):
        body = {"messages": [{"role": role, "content": [part(WIDE)]}]}
        reply = await client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400
        assert "role 'user'" in reply.json()["error"]["message"]


async def test_placeholders_in_a_plain_prompt(client: httpx.AsyncClient, served: ServedModel) -> None:
    for prompt in ("a<|image_pad|>", [70, served.tokenizer.image_token_id]):
        reply = await client.post("/v1/completions", json={"prompt": prompt})
        assert reply.status_code == 400
        assert "stands for an image" in reply.json()["error"]["message"]


async def test_the_body_may_be_larger_for_chats_only(client: httpx.AsyncClient) -> None:
    for route, status in (("completions", 413), ("chat/completions", 400)):
        reply = await client.post(f"/v1/{route}", content=b" " * (9 * 2**20))
        assert reply.status_code == status


async def test_a_model_without_vision_says_so(engine: LoopEngine, tmp_path: Path) -> None:
    blind = FakeEngine(TextTokenizer(write_byte_level(tmp_path), max_length=200), lambda context: "hello")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(build_api(blind)), base_url="http://test") as client:
        body = {"messages": [{"role": "user", "content": [text("a"), part(WIDE)]}]}
        reply = await client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert "takes text only and cannot see images" in reply.json()["error"]["message"]


async def test_decoding_leaves_the_event_loop_free(served: ServedModel) -> None:
    """While an image of many pixels is decoded, the loop turns."""
    limits = ImageLimits(max_pixels=2**26)
    tokenizer = ImageTextTokenizer(served.path, max_length=200, image_limits=limits)
    large = data_url(encoded(Image.fromarray(np.zeros((4000, 4000, 3), dtype=np.uint8))))
    request = TextGenerationRequest(RequestID(), messages=[{"role": "user", "content": [part(large)]}])
    working = asyncio.create_task(tokenizer.new_context(request))
    turns = 0
    while not working.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len((await working).images) == 1
    assert turns > 5
