"""No kernel is compiled while requests are served: the warm-up has met every variant, counted without a GPU.

Launches are bound and specialized as Triton does it for an sm_90, then left out: results are whatever memory holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from max_ray import kernels
from max_ray.engine import runner as runner_module
from max_ray.engine.graphs import DecodeGraphs
from max_ray.engine.kv_storage import KVStorage
from max_ray.engine.runner import ModelRunner
from max_ray.engine.sampling.sampler import Sampler
from max_ray.engine.warm_up import WarmUp
from max_ray.interfaces import LogitControls, RunRequest, RunRow, SamplingParams
from max_ray.kernels import gpu
from max_ray.kernels.gpu import attention, latent, quantized
from tests.checkpoints import make_llama
from tests.engine.ahead import Recorder
from tests.gpu import families
from tests.gpu import models as gpu_models
from tests.gpu.families import DENSE_DEEPSEEK, GPT_OSS, make_family

MAX_LENGTH, MAX_ROWS, MAX_TOKENS, PAGE = 4096, 40, 600, 16
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "logit_controls": LogitControls(logit_bias=((3, -1.0),))},
    {"temperature": 1.0, "presence_penalty": 0.5},
]


class Variants:
    """Stands for a GPU: notes which variant each launch would compile."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, str]] = set()
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[str, Callable[..., Any]] = {}

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        if name not in self._binders:
            self._binders[name] = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        _, specialization, options = self._binders[name](*args, **constants)
        self.seen.add((name, str(specialization), str(sorted(options.items()))))
        if name == "sampling.sample_kernel":
            args[kernel.arg_names.index("tokens")].zero_()


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Variants:
    found = Variants()
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: found.launch(self, *args, **kwargs))
    monkeypatch.setattr(kernels, "_backend", lambda x: gpu)
    monkeypatch.setattr(kernels, "has_native", lambda: False)
    monkeypatch.setattr(runner_module, "Sampler", partial(Sampler, kernel=gpu.sample))
    for module in (attention, latent, quantized):
        monkeypatch.setattr(module, "num_processors", lambda device: 132)
    for module in (gpu_models, families):
        monkeypatch.setattr(module, "MAX_LENGTH", MAX_LENGTH)
    return found


def lab_of(name: str, folder: Path) -> gpu_models.Lab:
    if name == GPT_OSS:
        return gpu_models.Lab(make_family(name, folder / "m"), torch.device("cpu"))
    if name == DENSE_DEEPSEEK:  # strides that are multiples of 16 whatever the number of tokens, as DeepSeek's are
        dims = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
        return gpu_models.Lab(make_family(name, folder / "m", **dims), torch.device("cpu"))
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": MAX_LENGTH}
    return gpu_models.Lab(make_llama(folder / "m", tokenizer=False, **sizes), torch.device("cpu"), name)


def runner_of(lab: gpu_models.Lab) -> ModelRunner:
    """As a worker has it: warmed up over a cache of its own, then with graphs."""
    params = lab.model.get_kv_params(
        lab.model.pipeline_config, lab.model.huggingface_config, lab.model.encoding
    )  # fmt: skip
    device = torch.device("cpu")
    small = KVStorage.allocate(params, MAX_TOKENS // PAGE + 1, device)
    warm_up = WarmUp(lab.model, small, ModelRunner(lab.model, small, lab.tp, lab.vocab_size), MAX_LENGTH, MAX_TOKENS)
    warm_up.compile_all()
    warm_up.largest_step()
    storage = KVStorage.allocate(params, MAX_ROWS * MAX_LENGTH // PAGE, device)
    graphs = DecodeGraphs(lab.model, storage, MAX_ROWS, MAX_LENGTH, Recorder())
    graphs.capture_all()
    return ModelRunner(lab.model, storage, lab.tp, lab.vocab_size, graphs, lookahead=1)


def random_run(rng: random.Random, number: int) -> RunRequest:
    steps = rng.randint(1, 4)
    rows, left = [], MAX_TOKENS - MAX_ROWS
    for index in range(rng.choice([1, 2, 3, 7, 16, 17, MAX_ROWS])):
        new = 1 if rng.random() < 0.6 else rng.randint(1, max(1, min(left, rng.choice([3, 40, 300]))))
        left -= new - 1
        cached = rng.choice([0, rng.randint(0, 200), rng.randint(0, MAX_LENGTH - new - steps)])
        echo = rng.random() < 0.05
        blocks = -(-(cached + new + steps) // PAGE)
        rows.append(
            RunRow(
                request_id=str(index),
                active_tokens=np.full(new, 5, dtype=np.int64),
                processed_length=cached,
                block_table=(index * (MAX_LENGTH // PAGE) + np.arange(blocks)).astype(np.int32),
                max_new_tokens=0 if rng.random() < 0.05 and not echo else steps,
                sampling_params=SamplingParams(seed=index, **rng.choice(KINDS)),
                stop_ids=frozenset(),
                generated_length=0,
                prompt_length=cached + new,
                history=np.full(cached + new, 5, dtype=np.int64),
                log_probabilities=1 if echo else None,
                echo=echo,
            )
        )
    return RunRequest(number, rows, steps)


@pytest.mark.parametrize("name", ["bfloat16", "q8_0", DENSE_DEEPSEEK, pytest.param(GPT_OSS, marks=pytest.mark.slow)])
def test_no_variant_is_new_after_the_warm_up(name: str, tmp_path: Path, variants: Variants) -> None:
    runner = runner_of(lab_of(name, tmp_path))
    warm, rng = set(variants.seen), random.Random(0)
    kinds = {kernel for kernel, *_ in warm}
    assert "sampling.sample_kernel" in kinds
    used: set[str] = set()
    for number in range(200):
        for _ in runner.run(random_run(rng, number)):
            pass
        new = variants.seen - warm
        assert not new, f"batch {number}: {sorted(new)[0]}"
        used |= {kernel for kernel, *_ in variants.seen}
    print(f"{name}: {len(warm)} variants of {len(kinds)} kernels")
    assert used == kinds


def test_strides_and_row_counts_make_no_variants(variants: Variants) -> None:
    """Tables of any width, batches of any size: one variant of each attention kernel with one split."""
    from tests.kernels.attention_batches import make_batch

    for rows in range(1, 20):
        batch = make_batch([(0, 2)] * rows + [(15 + rows, 1)], page_size=1, head_dim=16)
        arguments = (batch.q, batch.k_cache, batch.v_cache, batch.kv, batch.qo_indptr)
        gpu.paged_attention(*arguments, scale=0.3, sliding_window=None, logit_softcap=None)
    assert sorted(kernel for kernel, *_ in variants.seen) == ["decode.decode_kernel", "prefill.prefill_kernel"]
