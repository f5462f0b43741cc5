"""Families with attention of their own on the Triton kernels: decode steps ask the device nothing, tokens are the same.

TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu/interpreted_models.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from architectures.deepseek import deepseek
from max_ray import kernels
from max_ray.engine.graphs import Replay
from max_ray.kernels import gpu
from max_ray.kernels.native.tape import NotRecordableError, _NoReading
from max_ray.nn import Experts
from tests.engine.ahead import Recorder
from tests.gpu.families import DEEPSEEK, DENSE_DEEPSEEK, GPT_OSS, make_family
from tests.gpu.models import Lab, request, tokens_of
from tests.kernels.attention_batches import make_batch
from tests.kernels.gpu.interpreted_latent import make_batch as make_latents
from tests.kernels.gpu.interpreted_pipeline import NoQuestions

PROMPTS = [[3 + (31 * j) % 150 for j in range(length)] for length in (1, 18)]
NUM_STEPS = 3


class GuardedRecorder(Recorder):
    """Stands for CudaCapture, which fails where the host waits."""

    def __call__(self, function: Callable[[], torch.Tensor]) -> Replay:
        def guarded() -> torch.Tensor:
            with _NoReading(), NoQuestions():
                return function()

        return super().__call__(guarded)


@pytest.mark.parametrize("name", [DENSE_DEEPSEEK, GPT_OSS, pytest.param(DEEPSEEK, marks=pytest.mark.slow)])
def test_replayed_decode_steps_equal_those_of_the_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts stacked and weights not packed, as on a GPU."""
    monkeypatch.setattr(deepseek, "Experts", partial(Experts, grouped=True))
    monkeypatch.setattr(kernels, "has_native", lambda: False)
    lab = Lab(make_family(name, tmp_path), torch.device("cpu"))
    run = request(PROMPTS, NUM_STEPS, [{}])
    expected = tokens_of(lab.runner(None, 0), run)
    monkeypatch.setattr(kernels, "_backend", lambda x: gpu)
    recorder = GuardedRecorder()
    assert tokens_of(lab.runner(recorder, 0), run) == expected
    assert recorder.sizes, "no step was replayed"


def test_prompts_ask_nothing_either() -> None:
    latents, batch = make_latents([(7, 1), (4, 0), (5, 3), (0, 9)]), make_batch([(7, 1), (4, 0), (5, 3), (0, 9)])
    with _NoReading(), NoQuestions():
        gpu.latent_attention(latents.q, latents.cache, latents.kv, latents.qo_indptr, up=latents.up, scale=0.2)
        arguments = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
        options = {"scale": 0.2, "sliding_window": 3, "logit_softcap": None}
        gpu.paged_attention(*arguments, **options, sinks=torch.zeros(4))


def test_a_step_that_reads_a_tensor_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference implementation of attention over latents plans on the host."""
    monkeypatch.setattr(kernels, "_backend", lambda x: kernels.reference)
    lab = Lab(make_family(DENSE_DEEPSEEK, tmp_path), torch.device("cpu"))
    with pytest.raises(NotRecordableError):
        tokens_of(lab.runner(GuardedRecorder(), 0), request(PROMPTS, NUM_STEPS, [{}]))
