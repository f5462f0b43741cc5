"""The way of a GPU as a whole, in Triton's interpreter: Triton kernels, draws on the device, replayed steps, lookahead.

TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu/interpreted_pipeline.py
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from max_ray import kernels
from max_ray.engine import runner
from max_ray.engine.sampling.sampler import Sampler
from max_ray.interfaces import TextContext
from max_ray.kernels import gpu, reference
from max_ray.pipelines.text_generation import TextGenerationPipeline
from tests.engine.ahead import Recorder, ahead
from tests.engine.test_logit_controls import random_row
from tests.engine.test_sampler import CPU, VOCAB_SIZE, mixed_rows
from tests.pipelines.conftest import Lab, make_context, random_prompt, run_to_end

ASKS_THE_DEVICE = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}


class NoQuestions(TorchDispatchMode):
    """Fails on operations that would make the host wait for a GPU."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ASKS_THE_DEVICE, f"{name} waits for the device"
        if name in ("index", "index_put_", "index_put"):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, f"{name} with a mask waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def pipeline(shared_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> TextGenerationPipeline:
    monkeypatch.setattr(kernels, "_backend", lambda x: gpu)
    monkeypatch.setattr(runner, "Sampler", partial(Sampler, kernel=gpu.sample))
    return ahead(shared_lab.pipeline(), recorder=Recorder(), max_batch_size=2)


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.9, "min_p": 0.02, "seed": 5},
]


def test_questions_are_noticed() -> None:
    with NoQuestions():
        torch.ones(3).sum()
        with pytest.raises(AssertionError, match="waits"):
            bool(torch.ones(3).all())
        with pytest.raises(AssertionError, match="mask"):
            torch.ones(3)[torch.ones(3, dtype=torch.bool)]


def contexts() -> list[TextContext]:
    return [make_context(random_prompt(3 + i), max_new_tokens=3, **kind) for i, kind in enumerate(KINDS)]


@pytest.mark.slow
def test_tokens_equal_those_of_the_reference(shared_lab: Lab, pipeline: TextGenerationPipeline) -> None:
    with NoQuestions():
        outputs = run_to_end(pipeline, contexts(), num_steps=4)
    assert outputs[0].tokens == shared_lab.greedy(random_prompt(3), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_backend", lambda x: reference)
        patch.setattr(runner, "Sampler", Sampler)
        expected = run_to_end(shared_lab.pipeline(), contexts(), num_steps=4)
    assert [output.tokens for output in outputs] == [output.tokens for output in expected]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["q8_0", "q4_0"])
def test_a_quantized_model_waits_for_nothing(shared_lab: Lab, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 40 and 3 tokens, then decode steps: both kernels for quantized weights."""
    prompts = [random_prompt(40), random_prompt(3)]

    def run(pipeline: TextGenerationPipeline) -> list[list[int]]:
        outputs = run_to_end(pipeline, [make_context(prompt, max_new_tokens=4) for prompt in prompts], num_steps=4)
        return [output.tokens for output in outputs]

    monkeypatch.setattr(kernels, "_backend", lambda x: gpu)
    with NoQuestions():
        actual = run(ahead(shared_lab.pipeline(quantization_encoding=encoding), recorder=Recorder(), max_batch_size=2))
    monkeypatch.setattr(kernels, "_backend", lambda x: reference)
    assert actual == run(shared_lab.pipeline(page_size=32, quantization_encoding=encoding))


def test_the_sampler_on_the_device_gives_the_tokens_of_the_one_on_the_host() -> None:
    """Penalties, masks and reports beside it; rows end on the way."""
    rows = mixed_rows()
    on_host, on_device = Sampler(rows, VOCAB_SIZE, CPU), Sampler(rows, VOCAB_SIZE, CPU, gpu.sample)
    alive = list(range(len(rows)))
    for step in range(2):
        logits = torch.randn(len(alive), VOCAB_SIZE, generator=torch.Generator().manual_seed(step)) * 3
        expected, actual = on_host.sample(logits, alive), on_device.sample(logits, alive)
        assert actual.tokens.tolist() == expected.tokens.tolist()
        assert actual.log_probabilities == expected.log_probabilities
        alive = [row for row in alive if row != 2 * step]


@pytest.mark.parametrize("case", range(3))
def test_logit_controls_on_the_device(case: int) -> None:
    """The same tokens as on the host, without a wait; rows end on the way."""
    rng = random.Random(case)
    rows = [random_row(rng, 10 * case + number) for number in range(12)]
    on_host, on_device = Sampler(rows, VOCAB_SIZE, CPU), Sampler(rows, VOCAB_SIZE, CPU, gpu.sample)
    alive = list(range(len(rows)))
    for step in range(3):
        logits = torch.randn(len(alive), VOCAB_SIZE, generator=torch.Generator().manual_seed(step)) * 3
        expected = on_host.sample(logits, alive).tokens.tolist()
        with NoQuestions():
            sampled = on_device.sample(logits, alive)
        assert sampled.tokens.tolist() == expected
        for sampler in (on_host, on_device):
            sampler.accept(alive, expected)
        alive = [row for row in alive if row != 2 * step]
