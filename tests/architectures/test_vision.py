"""Qwen3-VL, dense and as a mixture of experts, against transformers: texts, one image, several of unequal sizes side by
side with texts; chunks that cut images; prefix hits inside of an image and behind it; 1 and 2 ranks; bfloat16."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures.qwen3_vl.model import Qwen3VLModel
from architectures.qwen3_vl_moe.weight_adapters import UnfusedExperts
from max_ray.config import PipelineConfig
from max_ray.conformance.reference import huggingface_reference
from max_ray.conformance.suite import LOGIT_LIMIT, PAGE, ROUTED_LOGIT_LIMIT, Suite, run_ranks
from max_ray.distributed import TPGroup
from max_ray.errors import ConfigError, WeightsError
from max_ray.huggingface import HuggingFaceConfig, load_huggingface_config
from max_ray.interfaces import SupportedEncoding
from max_ray.weights import DictWeightSource
from tests.architectures.vision import (
    CUT_INSIDE,
    DENSE,
    MIXED,
    SPARSE,
    VISION_FAMILIES,
    Prompt,
    VisionEngine,
    VisionFamily,
    VisionLab,
    picture,
    prompt,
)

LabOf = Callable[[VisionFamily], VisionLab]


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
@pytest.mark.parametrize("family", VISION_FAMILIES.values(), ids=VISION_FAMILIES)
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
        "inside": CUT_INSIDE,
    }

    def run(tp: TPGroup) -> dict[str, list[torch.Tensor]]:
        model = lab.suite.load(tp, SupportedEncoding.float32)
        return {name: VisionEngine(model, MIXED).logits_of(tokens, cut) for name, cut in cuts.items()}

    answers = run_ranks(num_ranks, run)
    errors = {name: worst(lab, MIXED, [answer[name] for answer in answers]) for name in cuts}
    assert {name: error for name, error in errors.items() if error > limit(lab)} == {}


@pytest.mark.parametrize("family", VISION_FAMILIES.values(), ids=VISION_FAMILIES)
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
@pytest.mark.parametrize("family", VISION_FAMILIES.values(), ids=VISION_FAMILIES)
def test_greedy_tokens(lab_of: LabOf, family: VisionFamily, num_ranks: int) -> None:
    lab = lab_of(family)
    each = MIXED[2]

    def run(tp: TPGroup) -> list[int]:
        model = lab.suite.load(tp, SupportedEncoding.float32)
        return VisionEngine(model, [each]).greedy(each.tokens, 12)

    for tokens in run_ranks(num_ranks, run):
        theirs = lab.reference.logits(each, tokens)[len(each.tokens) - 1 : -1].argmax(-1)
        assert tokens == theirs.tolist()


@pytest.mark.parametrize("family", VISION_FAMILIES.values(), ids=VISION_FAMILIES)
def test_bfloat16(lab_of: LabOf, family: VisionFamily) -> None:
    assert [verdict for verdict in lab_of(family).run(1, SupportedEncoding.bfloat16) if not verdict.passed] == []


@pytest.mark.parametrize("family", VISION_FAMILIES.values(), ids=VISION_FAMILIES)
def test_texts_go_through_the_suite_of_all_families(lab_of: LabOf, family: VisionFamily) -> None:
    suite = replace(lab_of(family).suite, reference=huggingface_reference(lab_of(family).path))
    assert [verdict for verdict in suite.run(1, SupportedEncoding.float32) if not verdict.passed] == []


def test_the_image_changes_the_answer(lab_of: LabOf) -> None:
    """Else the tests above would pass with any pixels."""
    lab = lab_of(DENSE)
    one, other = (prompt(5, picture(40, 24, seed=seed), 7, seed=2) for seed in (0, 9))
    assert one.tokens == other.tokens
    assert float((lab.exact(one)[-1] - lab.exact(other)[-1]).abs().max()) > 0.1


def exchange_expert_axes(source: Path, target: Path) -> None:
    """A copy of a checkpoint with its fused experts as the released ones have them."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    exchanged = {name: t.mT.contiguous() if ".experts." in name else t for name, t in tensors.items()}
    save_file(exchanged, target / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("num_ranks", "spread"), [(1, False), (2, False), (2, True)])
def test_both_layouts_of_fused_experts(lab_of: LabOf, tmp_path: Path, num_ranks: int, spread: bool) -> None:
    lab = lab_of(SPARSE)
    exchange_expert_axes(lab.path, tmp_path)
    for path in (lab.path, tmp_path):
        suite = replace(lab.suite, path=path, expert_parallel=spread)

        def run(tp: TPGroup, suite: Suite = suite) -> list[torch.Tensor]:
            model = suite.load(tp, SupportedEncoding.float32)
            return VisionEngine(model, MIXED[1:2]).logits_of([MIXED[1].tokens], [[len(MIXED[1].tokens)]])

        assert worst(lab, MIXED[1:2], run_ranks(num_ranks, run)) <= limit(lab)


def test_fused_experts_of_another_shape_are_named(lab_of: LabOf) -> None:
    tensors = load_file(lab_of(SPARSE).path / "model.safetensors")
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    tensors[name] = tensors[name][:, :-1]
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        UnfusedExperts(DictWeightSource(tensors), 8, 32, 24)


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        ("vision_config", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("vision_config", {"in_channels": 4}, "in_channels=4"),
        ("vision_config", {"out_hidden_size": 64}, "out_hidden_size=64"),
        ("vision_config", {"num_heads": 5}, "5 vision heads"),
        ("vision_config", {"deepstack_visual_indexes": [0, 3]}, "deepstack_visual_indexes"),
        ("vision_config", {"deepstack_visual_indexes": [0, 1, 2, 2]}, "deepstack_visual_indexes"),
        ("text_config", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
        ("text_config", {"rope_parameters": {"mrope_section": [4, 2, 2], "mrope_interleaved": False}}, "interleaved"),
        ("text_config", {"rope_parameters": {"mrope_section": [4, 4]}}, "three numbers"),
        ("text_config", None, "no 'text_config'"),
        ("vision_config", None, "no 'vision_config'"),
    ],
    ids=str,
)
def test_what_the_family_lacks_is_said(lab_of: LabOf, part: str, changes: dict[str, Any] | None, sentence: str) -> None:
    values = load_huggingface_config(lab_of(DENSE).path).to_dict()
    if changes is None:
        del values[part]
    else:
        values[part] |= changes
    config = HuggingFaceConfig(values)
    with pytest.raises(ConfigError, match=sentence):
        Qwen3VLModel.check_settings(PipelineConfig(model_path="m"), config)


def test_features_of_cut_images_are_kept_and_forgotten(lab_of: LabOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of the tower an image, however many chunks it is cut into; nothing stays behind; nothing is kept that
    has no room."""
    lab = lab_of(DENSE)
    each = MIXED[1]
    model = lab.suite.load(TPGroup.single(torch.device("cpu")), SupportedEncoding.float32)
    assert isinstance(model, Qwen3VLModel)
    calls: list[int] = []
    tower = model.network.visual.forward
    monkeypatch.setattr(model.network.visual, "forward", lambda *a: (calls.append(1), tower(*a))[1], raising=False)
    for room, num_calls in ((2**20, 1), (0, 5)):
        monkeypatch.setattr("architectures.qwen3_vl.model._KEPT_BYTES", room)
        calls.clear()
        chunks = [[each.images[0].start, 3, 3, 3, 3, len(each.tokens) - each.images[0].start - 12]]
        answer = VisionEngine(model, [each]).logits_of([each.tokens], chunks)
        assert worst(lab, [each], [answer]) <= LOGIT_LIMIT
        assert (len(calls), len(model._kept)) == (num_calls, 0)
