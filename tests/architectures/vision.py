"""Tiny random Qwen3-VL checkpoints, prompts with images in them, and how both sides run: ours over a paged cache by
hand, transformers with the pixels that its own processor makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from architectures.qwen3_vl import qwen3_vl_arch
from architectures.qwen3_vl_moe import qwen3_vl_moe_arch
from max_ray.conformance.engine import Engine
from max_ray.conformance.suite import KL_LIMIT, LOGIT_LIMIT, PAGE, ROUTED_LOGIT_LIMIT, Suite, Verdict, run_ranks
from max_ray.distributed import TPGroup
from max_ray.images.processor import ImageProcessor
from max_ray.interfaces import PromptImage, RunRow, SupportedEncoding
from max_ray.interfaces.image import images_within, position_offset
from max_ray.weights import WeightSource, open_weights
from tests.architectures.families import _randomize
from tests.checkpoints import make_tokenizer

PLACEHOLDER, VIDEO, START, END = 150, 151, 152, 153
PATCH, MERGE = 4, 2
PROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 2 * (PATCH * MERGE) ** 2, "longest_edge": 40 * (PATCH * MERGE) ** 2},
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.3],
}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}
TEXT: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
IDS = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
SERVED_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 1}


@dataclass(frozen=True, eq=False)
class VisionFamily:
    """A class of transformers, and what is special in its tiny checkpoint. routed: a mixture of experts."""

    class_name: str
    text: dict[str, Any]
    tied: bool = False
    routed: bool = False


DENSE = VisionFamily("Qwen3VLForConditionalGeneration", {})
DENSE_TIED = VisionFamily("Qwen3VLForConditionalGeneration", {"num_key_value_heads": 1}, tied=True)
SPARSE = VisionFamily("Qwen3VLMoeForConditionalGeneration", EXPERTS, routed=True)

VISION_FAMILIES = {"Qwen3-VL": DENSE, "Qwen3-VL, tied, one KV head": DENSE_TIED, "Qwen3-VL MoE": SPARSE}


def make_vision(
    family: VisionFamily, directory: Path, seed: int = 0, ids: dict[str, int] | None = None, **text: Any
) -> Path:
    """Writes config.json, model.safetensors and preprocessor_config.json; the same arguments give the same bytes."""
    network_class = getattr(transformers, family.class_name)
    config = network_class.config_class(
        text_config={**TEXT, **family.text, **text},
        vision_config=VISION,
        tie_word_embeddings=family.tied,
        **(ids or IDS),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = network_class(config).float().eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                _randomize(name, parameter, 1.0, family.tied)
    network.save_pretrained(directory)
    their_processor().save_pretrained(directory)
    return directory


def make_served_vision(family: VisionFamily, directory: Path) -> Path:
    """The same with a byte-level tokenizer and a chat template, for requests."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SERVED_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    numbers = tokenizer.convert_tokens_to_ids(list(SERVED_TOKENS))
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, numbers, strict=True))
    make_vision(family, directory, ids=ids, vocab_size=272, eos_token_id=None)
    tokenizer.save_pretrained(directory)
    return directory


def their_processor() -> Any:
    return Qwen2VLImageProcessorPil(**PROCESSOR)


def our_processor() -> ImageProcessor:
    return ImageProcessor(
        token_pixels=PATCH * MERGE,
        min_pixels=PROCESSOR["size"]["shortest_edge"],
        max_pixels=PROCESSOR["size"]["longest_edge"],
        mean=tuple(PROCESSOR["image_mean"]),
        std=tuple(PROCESSOR["image_std"]),
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random colours."""
    colours = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colours)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids with placeholders in them, and the pictures in order."""

    tokens: list[int]
    pictures: tuple[Image.Image, ...] = ()
    images: tuple[PromptImage, ...] = ()


def prompt(*parts: int | Image.Image, seed: int = 0) -> Prompt:
    """A number is so many random text tokens; a picture stands between its start and end tokens."""
    generator = np.random.default_rng(seed)
    tokens: list[int] = []
    images: list[PromptImage] = []
    for part in parts:
        if isinstance(part, int):
            tokens += generator.integers(0, PLACEHOLDER, part).tolist()
            continue
        tokens.append(START)
        image = our_processor().process(part, start=len(tokens))
        tokens += [PLACEHOLDER] * image.num_tokens + [END]
        images.append(image)
    return Prompt(tokens, tuple(part for part in parts if not isinstance(part, int)), tuple(images))


MIXED = [
    prompt(PAGE + 1, seed=1),
    prompt(5, picture(40, 24), 7, seed=2),
    prompt(3, picture(40, 24, seed=1), 2, picture(17, 70), 6, seed=3),  # 3 x 5 and 9 x 2 tokens
    prompt(picture(8, 24), picture(40, 24), seed=4),  # an image of the second prompt too; nothing behind it but its end
]
CUT_INSIDE = [[PAGE + 1], [7, 9, 13], [7, 5, 1, 20, 15], [5, 9, 8]]
"""Chunks of MIXED that end inside of images."""


class VisionEngine(Engine):
    """An Engine for prompts; `prompts` are those whose tokens the sequences are, by number."""

    def __init__(self, model: Any, prompts: Sequence[Prompt], num_rows: int = 5) -> None:
        super().__init__(model, num_rows)
        self._prompts = prompts

    def _row(self, index: int, sequence: Sequence[int], start: int, count: int) -> RunRow:
        images = self._prompts[index].images
        return replace(
            super()._row(index, sequence, start, count),
            images=images_within(images, start, start + count),
            position_offset=position_offset(images, start),
        )


class VisionReference:
    """The model of a folder as transformers computes it, each prompt alone, no cache."""

    def __init__(self, path: Path, family: VisionFamily, dtype: torch.dtype = torch.float32) -> None:
        network_class = getattr(transformers, family.class_name)
        self._model = network_class.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
        self._processor = their_processor()

    def greedy(self, prompt: Prompt, num_tokens: int) -> list[int]:
        """The likeliest token after the prompt, `num_tokens` times."""
        tokens: list[int] = []
        for _ in range(num_tokens):
            tokens.append(int(self.logits(prompt, tokens)[-1].argmax()))
        return tokens

    def logits(self, prompt: Prompt, generated: Sequence[int] = ()) -> torch.Tensor:
        """[length, V] of the prompt and what was generated behind it."""
        ids = torch.tensor([[*prompt.tokens, *generated]])
        inputs: dict[str, Any] = {}
        if prompt.pictures:
            inputs = dict(self._processor(list(prompt.pictures), return_tensors="pt"))
        kinds = (ids == self._model.config.image_token_id).int()
        with torch.inference_mode():
            output = self._model(ids, mm_token_type_ids=kinds, use_cache=False, **inputs)
        return output.logits[0].float()


class VisionLab:
    """A family's checkpoint, reference and conformance suite."""

    def __init__(self, family: VisionFamily, folder: Path, **text: Any) -> None:
        self.family = family
        self.path = make_vision(family, folder, **text)
        self.reference = VisionReference(self.path, family)
        record = next(record for record in (qwen3_vl_arch, qwen3_vl_moe_arch) if record.name == family.class_name)
        self.suite = Suite(record, self.path, lambda sequences: [], family.routed)
        self.exact = cache(self.reference.logits)

    def weights(self) -> WeightSource:
        return open_weights(self.path)

    def run(self, num_ranks: int, encoding: SupportedEncoding) -> list[Verdict]:
        """As Suite.run, over prompts with images: MIXED whole, MIXED cut inside of images, and a hit that ends inside
        of one."""
        whole = [[len(each.tokens)] for each in MIXED]
        hit = [MIXED[2], Prompt([*MIXED[2].tokens[:-2], 7, 8], MIXED[2].pictures, MIXED[2].images)]
        after_hit = [[len(hit[0].tokens)], [0, len(hit[1].tokens) - 2 * PAGE]]
        is_exact = encoding is SupportedEncoding.float32

        def answers(tp: TPGroup) -> tuple[list[list[torch.Tensor]], list[int]]:
            model = self.suite.load(tp, encoding)
            tokens = [each.tokens for each in MIXED]
            runs = [VisionEngine(model, MIXED).logits_of(tokens, cut) for cut in (whole, CUT_INSIDE)]
            engine = VisionEngine(model, hit)
            engine.share_prefix(0, 1, 2 * PAGE)
            runs.append(engine.logits_of([each.tokens for each in hit], after_hit, [0, 2 * PAGE]))
            return runs, VisionEngine(model, MIXED[2:]).greedy(MIXED[2].tokens, 12) if is_exact else []

        of_ranks = run_ranks(num_ranks, answers)
        exact = [[self.exact(each) for each in prompts] for prompts in (MIXED, MIXED, hit)]
        exact[2][1] = exact[2][1][2 * PAGE :]
        logits = [[runs[case] for runs, _ in of_ranks] for case in range(3)]
        errors = [max(self._error(ours, theirs, is_exact) for ours in logits[i]) for i, theirs in enumerate(exact)]
        greedy = [tokens == self.reference.greedy(MIXED[2], 12) for _, tokens in of_ranks] if is_exact else []
        limit = KL_LIMIT if not is_exact else ROUTED_LOGIT_LIMIT if self.family.routed else LOGIT_LIMIT
        names = ("paged", "chunked", "prefix hit")
        drawn = (all(greedy) if is_exact else None, None, None)
        return [
            Verdict(name, num_ranks, encoding, error, limit, equal)
            for name, error, equal in zip(names, errors, drawn, strict=True)
        ]

    def their_divergence(self) -> float:
        """Of transformers' own bfloat16 from its float32, over MIXED."""
        theirs = VisionReference(self.path, self.family, torch.bfloat16)
        return self.suite.divergence([theirs.logits(each) for each in MIXED], [self.exact(each) for each in MIXED])

    def _error(self, ours: list[torch.Tensor], exact: list[torch.Tensor], is_exact: bool) -> float:
        if not is_exact:
            return self.suite.divergence(ours, exact)
        return max(float((a - b).abs().max()) for a, b in zip(ours, exact, strict=True))
