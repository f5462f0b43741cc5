"""Qwen3-VL, dense and as a mixture of experts, against transformers: texts, one image, several of unequal sizes side by
side with texts; chunks that cut images; prefix hits inside of an image and behind it; 1 and 2 ranks; bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from max_ray.conformance.suite import KL_LIMIT, LOGIT_LIMIT, PAGE, ROUTED_LOGIT_LIMIT, run_ranks
from max_ray.distributed import TPGroup
from max_ray.interfaces import SupportedEncoding
from tests.architectures.vision import (
    DENSE,
    DENSE_TIED,
    SPARSE,
    Prompt,
    VisionEngine,
    VisionFamily,
    VisionLab,
    picture,
    prompt,
)

FAMILIES = {"dense": DENSE, "dense, tied": DENSE_TIED, "mixture of experts": SPARSE}
LabOf = Callable[[VisionFamily], VisionLab]

MIXED = [
    prompt(PAGE + 1, seed=1),
    prompt(5, picture(40, 24), 7, seed=2),
    prompt(3, picture(40, 24, seed=1), 2, picture(17, 70), 6, seed=3),  # 3 x 5 and 9 x 2 tokens
    prompt(picture(8, 24), picture(40, 24), seed=4),  # an image of the second prompt too; nothing behind it but its end
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lab_of(tmp_path_factory: pytest.TempPathFactory) -> LabOf:
    return cache(lambda family: VisionLab(family, tmp_path_factory.mktemp("vision")))


def worst(lab: VisionLab, prompts: list[Prompt], answers: list[list[torch.Tensor]], skipped: int = 0) -> float:
    """The largest difference of a logit on any rank; of the last prompt from token `skipped` on."""
    exact = [lab.exact(each) for each in prompts]
    exact[-1] = exact[-1][skipped:]
    return max(
        float((ours - theirs).abs().max()) for answer in answers for ours, theirs in zip(answer, exact, strict=True)
    )


def limit(lab: VisionLab) -> float:
    return ROUTED_LOGIT_LIMIT if lab.family.routed else LOGIT_LIMIT


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_mixed_rows_whole_and_in_chunks(lab_of: LabOf, family: VisionFamily, num_ranks: int) -> None:
    lab = lab_of(family)
    tokens = [each.tokens for each in MIXED]
    second, third = MIXED[1].images[0], MIXED[2].images
    cuts = {
        "whole": [[len(each)] for each in tokens],
        "token by token": [[1] * len(each) for each in tokens],
        "at an image's edges": [
            [4, PAGE + 1 - 4],
            [second.start, second.num_tokens, len(tokens[1]) - second.end],
            [third[0].end, third[1].start - third[0].end + 1, len(tokens[2]) - third[1].start - 1],
            [1, 1, len(tokens[3]) - 2],
        ],
        "inside": [[PAGE + 1], [second.start + 1, 9, len(tokens[1]) - second.start - 10], [7, 5, 1, 20, 15], [5, 9, 8]],
    }

    def run(tp: TPGroup) -> dict[str, list[torch.Tensor]]:
        model = lab.suite.load(tp, SupportedEncoding.float32)
        return {name: VisionEngine(model, MIXED).logits_of(tokens, cut) for name, cut in cuts.items()}

    answers = run_ranks(num_ranks, run)
    errors = {name: worst(lab, MIXED, [answer[name] for answer in answers]) for name in cuts}
    assert {name: error for name, error in errors.items() if error > limit(lab)} == {}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("cached", [PAGE, 2 * PAGE, 4 * PAGE])
def test_a_prefix_hit_inside_of_an_image_and_behind_it(lab_of: LabOf, family: VisionFamily, cached: int) -> None:
    lab = lab_of(family)
    source = prompt(5, picture(40, 24), picture(17, 70), 4, seed=5)
    assert source.images[0].start < PAGE < 2 * PAGE < source.images[0].end < source.images[1].start < 4 * PAGE
    other = Prompt([*source.tokens[:-3], 7, 8, 9, 10], source.pictures, source.images)

    def run(tp: TPGroup) -> list[torch.Tensor]:
        engine = VisionEngine(lab.suite.load(tp, SupportedEncoding.float32), [source, other])
        engine.share_prefix(0, 1, cached)
        chunks = [[len(source.tokens)], [0, len(other.tokens) - cached]]
        return engine.logits_of([source.tokens, other.tokens], chunks, [0, cached])

    assert worst(lab, [source, other], run_ranks(1, run), skipped=cached) <= limit(lab)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_greedy_tokens(lab_of: LabOf, family: VisionFamily, num_ranks: int) -> None:
    lab = lab_of(family)
    for each in MIXED[1:]:

        def run(tp: TPGroup, each: Prompt = each) -> list[int]:
            model = lab.suite.load(tp, SupportedEncoding.float32)
            return VisionEngine(model, [each]).greedy(each.tokens, 12)

        for tokens in run_ranks(num_ranks, run):
            theirs = lab.reference.logits(each, tokens)[len(each.tokens) - 1 : -1].argmax(-1)
            assert tokens == theirs.tolist()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_bfloat16(lab_of: LabOf, family: VisionFamily) -> None:
    lab = lab_of(family)
    tokens = [each.tokens for each in MIXED]

    def run(tp: TPGroup) -> list[torch.Tensor]:
        model = lab.suite.load(tp, SupportedEncoding.bfloat16)
        return VisionEngine(model, MIXED).logits_of(tokens, [[len(each)] for each in tokens])

    (ours,) = run_ranks(1, run)
    assert lab.suite.divergence(ours, [lab.exact(each) for each in MIXED]) <= KL_LIMIT


def test_the_image_changes_the_answer(lab_of: LabOf) -> None:
    """Else the tests above would pass with any pixels."""
    lab = lab_of(DENSE)
    one, other = (prompt(5, picture(40, 24, seed=seed), 7, seed=2) for seed in (0, 9))
    assert one.tokens == other.tokens
    assert float((lab.exact(one)[-1] - lab.exact(other)[-1]).abs().max()) > 0.1
