"""Steps launched ahead and decode steps replayed from buffers give the same tokens as steps taken one by one.

On a CPU, with graphs that call their function again; tests/gpu does the same with CUDA's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from max_ray import kernels
from max_ray.engine.graphs import DecodeGraphs, buckets_up_to, capture_tape, decode_graphs
from max_ray.engine.local_executor import LocalExecutor
from max_ray.interfaces import ModelInputs, RunRequest, RunRow, TextContext
from max_ray.nn import ForwardBatch
from max_ray.pipelines.text_generation import TextGenerationPipeline
from tests.architectures.engine import load_model
from tests.checkpoints import make_llama
from tests.engine.ahead import Recorder, ahead
from tests.engine.test_sampled_runs import batch_of_16, batch_of_controls
from tests.gpu.families import DEEPSEEK, DENSE_DEEPSEEK, GPT_OSS, make_family
from tests.gpu.models import Lab as FamilyLab
from tests.pipelines.conftest import Lab, execute, make_context, random_prompt, run_to_end
from tests.pipelines.test_parity import check_log_probabilities

WAYS = [(0, True), (1, False), (1, True), (2, True)]


def way(lab: Lab, lookahead: int, replayed: bool, page_size: int = 16, **settings: Any) -> TextGenerationPipeline:
    pipeline = lab.pipeline(page_size, **settings)
    return ahead(pipeline, lookahead=lookahead, recorder=Recorder() if replayed else None)


def generated(contexts: list[TextContext]) -> list[list[int]]:
    return [context.tokens.generated.tolist() for context in contexts]


@pytest.mark.parametrize(("lookahead", "replayed"), WAYS)
@pytest.mark.parametrize(("num_steps", "page_size"), [(1, 16), (2, 1), (8, 16), (100, 16)])
def test_rows_that_end_inside_a_run(lab: Lab, lookahead: int, replayed: bool, num_steps: int, page_size: int) -> None:
    """One by its end of sequence, one by its limit, one by a stop id; none gets a token more."""
    prompts = [random_prompt(n, seed=1) for n in (14, 16, 3)]
    greedy = [lab.greedy(prompt, 20) for prompt in prompts]
    contexts = [
        make_context(prompts[0], max_new_tokens=20, eos=[greedy[0][4]]),
        make_context(prompts[1], max_new_tokens=20),
        make_context(prompts[2], max_new_tokens=20, stop_token_ids=(greedy[2][9],)),
    ]
    outputs = run_to_end(way(lab, lookahead, replayed, page_size), contexts, num_steps)
    ends = [greedy[0].index(greedy[0][4]) + 1, 20, greedy[2].index(greedy[2][9]) + 1]
    assert [output.tokens for output in outputs] == [tokens[:end] for tokens, end in zip(greedy, ends, strict=True)]


@pytest.mark.parametrize(("lookahead", "replayed"), WAYS)
def test_every_kind_of_sampling(lab: Lab, lookahead: int, replayed: bool) -> None:
    expected, contexts = batch_of_16(), batch_of_16()
    run_to_end(lab.pipeline(), expected)
    run_to_end(way(lab, lookahead, replayed), contexts)
    assert generated(contexts) == generated(expected)


@pytest.mark.parametrize(("lookahead", "replayed"), WAYS)
def test_logit_controls(lab: Lab, lookahead: int, replayed: bool) -> None:
    """Those that look at the text on the device, and DRY, whose runs launch nothing ahead."""
    expected = [run_to_end(lab.pipeline(), [context])[0].tokens for context in batch_of_controls()]
    contexts = batch_of_controls()
    run_to_end(way(lab, lookahead, replayed), [c for c in contexts if not _uses_dry(c)])
    run_to_end(way(lab, lookahead, replayed), [c for c in contexts if _uses_dry(c)])
    assert [context.tokens.generated.tolist() for context in contexts] == expected


def _uses_dry(context: TextContext) -> bool:
    controls = context.sampling_params.logit_controls
    return controls is not None and controls.uses_dry


@pytest.mark.parametrize(("lookahead", "replayed"), WAYS)
def test_rows_that_come_and_go(lab: Lab, lookahead: int, replayed: bool) -> None:
    expected, contexts = batch_of_16(), batch_of_16()
    run_to_end(lab.pipeline(), expected)
    pipeline = way(lab, lookahead, replayed, page_size=1)
    for now in range(20):
        active = [context for i, context in enumerate(contexts) if i // 2 <= now and (i + now) % 3]
        execute(pipeline, active, num_steps=1 + now % 3)
    run_to_end(pipeline, contexts)
    assert generated(contexts) == generated(expected)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5])
def test_a_batch_between_two_buckets_is_filled_up(lab: Lab, num_rows: int) -> None:
    recorder = Recorder()
    pipeline = ahead(lab.pipeline(), lookahead=0, recorder=recorder, max_batch_size=5)
    prompts = [random_prompt(7 + n) for n in range(num_rows)]
    contexts = [make_context(prompt, max_new_tokens=6, logprobs=5) for prompt in prompts]
    outputs = run_to_end(pipeline, contexts)
    assert [output.tokens for output in outputs] == [lab.greedy(prompt, 6) for prompt in prompts]
    assert set(recorder.sizes) == {min(size for size in (1, 2, 4, 5) if size >= num_rows)}
    assert recorder.num_captured == 1
    for prompt, output in zip(prompts, outputs, strict=True):
        check_log_probabilities(lab, prompt, output)


def test_larger_batches_and_prompts_are_not_replayed(lab: Lab) -> None:
    recorder = Recorder()
    pipeline = ahead(lab.pipeline(), recorder=recorder, max_batch_size=2)
    contexts = [make_context(random_prompt(9 + n), max_new_tokens=4) for n in range(3)]
    run_to_end(pipeline, contexts)
    assert recorder.sizes == []
    (short,) = run_to_end(pipeline, [make_context(random_prompt(9), max_new_tokens=4)])
    assert short.tokens == lab.greedy(random_prompt(9), 4)
    assert recorder.sizes == [1, 1, 1], "the prompt's step is none of them"


def test_a_run_of_single_tokens_is_replayed_from_its_first_step(lab: Lab) -> None:
    recorder = Recorder()
    pipeline = ahead(lab.pipeline(), lookahead=0, recorder=recorder)
    context = make_context(random_prompt(9), max_new_tokens=7)
    execute(pipeline, [context], num_steps=3)
    before = len(recorder.sizes)
    execute(pipeline, [context], num_steps=4)
    assert len(recorder.sizes) == before + 4
    assert context.tokens.generated.tolist() == lab.greedy(random_prompt(9), 7)


def test_all_buckets_captured_at_the_start(lab: Lab) -> None:
    recorder = Recorder()
    pipeline = ahead(lab.pipeline(), recorder=recorder, max_batch_size=6)
    graphs = pipeline.executor.runners[0]._graphs
    graphs.capture_all()
    assert recorder.sizes == [6, 4, 2, 1]
    contexts = [make_context(random_prompt(3 * n + 1), max_new_tokens=5 + n) for n in range(6)]
    run_to_end(pipeline, contexts)
    assert recorder.num_captured == 4
    assert generated(contexts) == [lab.greedy(random_prompt(3 * n + 1), 5 + n) for n in range(6)]


def test_idle_rows_write_to_the_scratch_block_alone(lab: Lab) -> None:
    pipeline = ahead(lab.pipeline(), recorder=Recorder())
    storage = pipeline.executor.runners[0]._storage
    for cache in (*storage.keys, *storage.values):
        cache.fill_(-7.0)
    contexts = [make_context(random_prompt(5), max_new_tokens=8) for _ in range(3)]
    execute(pipeline, contexts, num_steps=8)
    used = {int(block) for context in contexts for block in context.block_table}
    for cache in (*storage.keys, *storage.values):
        written = {int(block) for block in (cache != -7.0).flatten(1).any(1).nonzero()}
        assert written == used | {storage.num_blocks}
        cache.zero_()
    assert pipeline.kv_manager.total_num_blocks == storage.num_blocks


@pytest.mark.parametrize(("lookahead", "ranks", "num_steps"), [(0, 1, 4), (1, 1, 4), (2, 1, 4), (0, 2, 4), (1, 2, 5)])
def test_a_run_told_to_stop_ends_with_the_steps_under_way(lab: Lab, lookahead: int, ranks: int, num_steps: int) -> None:
    pipeline = ahead(lab.pipeline(tensor_parallel_size=ranks), lookahead=lookahead)
    context = make_context(random_prompt(9), max_new_tokens=50)
    pipeline._allocate([context], 20)
    asked = itertools.count()
    request = RunRequest(1, [RunRow.from_context(context, 20)], 20)
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(lambda r=runner: list(r.run(request))) for runner in pipeline.executor.runners[1:]]
        steps = list(pipeline.executor.runners[0].run(request, lambda: next(asked) >= 3))
        assert all(len(other.result()) == num_steps for other in others)
    assert [step.last for step in steps] == [False] * (num_steps - 1) + [True]
    assert [int(step.tokens[0]) for step in steps] == lab.greedy(random_prompt(9), len(steps))
    pipeline.release(context.request_id)


def test_a_step_launched_in_vain_is_dropped(lab: Lab) -> None:
    prompt = random_prompt(14, seed=1)
    stop = lab.greedy(prompt, 5)[4]
    pipeline = ahead(lab.pipeline(), lookahead=1)
    context = make_context(prompt, max_new_tokens=20, eos=[stop], logprobs=1)
    other = make_context(random_prompt(3), max_new_tokens=3)
    outputs = execute(pipeline, [context, other], num_steps=20)
    length = lab.greedy(prompt, 20).index(stop) + 1
    assert len(outputs[0].tokens) == length
    assert outputs[0].log_probabilities is not None
    assert len(outputs[0].log_probabilities) == length
    assert pipeline.executor.forward_calls == length + 1


def test_two_ranks_stop_at_the_same_step(lab: Lab) -> None:
    pipeline = way(lab, 1, True, tensor_parallel_size=2)
    prompts = [random_prompt(n, seed=5) for n in (1, 17, 33)]
    greedy = [lab.greedy(prompt, 10) for prompt in prompts]
    contexts = [make_context(prompt, max_new_tokens=10, eos=[greedy[0][3]]) for prompt in prompts]
    outputs = run_to_end(pipeline, contexts, num_steps=6)
    for output, tokens in zip(outputs, greedy, strict=True):
        end = tokens.index(greedy[0][3]) + 1 if greedy[0][3] in tokens else 10
        assert output.tokens == tokens[:end]


def test_buckets() -> None:
    assert buckets_up_to(1) == [1]
    assert buckets_up_to(3) == [1, 2, 3]
    assert buckets_up_to(32) == [1, 2, 4, 8, 16, 32]
    assert buckets_up_to(100) == [1, 2, 4, 8, 16, 32, 64, 96, 100]
    assert buckets_up_to(256)[-4:] == [160, 192, 224, 256]


@pytest.mark.parametrize(
    ("device", "capturable", "setting"), [("cpu", False, "start"), ("cuda", False, "start"), ("cuda", True, "never")]
)
def test_nothing_is_captured_where_it_cannot_be_or_shall_not(device: str, capturable: bool, setting: str) -> None:
    model: Any = SimpleNamespace(device=torch.device(device), decode_is_capturable=capturable)
    storage: Any = None
    assert decode_graphs(model, storage, 4, 64, cuda_graphs=setting) is None


@pytest.mark.parametrize("name", [DENSE_DEEPSEEK, DEEPSEEK, GPT_OSS])
def test_on_a_cpu_steps_that_plan_on_the_host_are_not_recorded(name: str, tmp_path: Path) -> None:
    assert not FamilyLab(make_family(name, tmp_path), torch.device("cpu")).model.decode_is_capturable


def test_llama_can_be_captured_unless_its_rope_asks_the_host(lab: Lab, tmp_path: Path) -> None:
    model = lab.pipeline().executor.runners[0]._model
    assert model.decode_is_capturable
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    path = make_llama(tmp_path / "dynamic", tokenizer=False, rope_parameters=scaling)
    assert not load_model(path).decode_is_capturable


def test_a_recorded_step_reads_every_field_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """After other rows' steps, each tensor that the recording saw holds what a step of theirs would be given now."""
    if not kernels.has_native():
        pytest.skip("only the C++ kernels are recorded")
    pipeline = lab.pipeline(page_size=4)
    runner = ahead(pipeline, lookahead=0).executor.runners[0]
    model, seen = runner._model, []

    def forward_batch(inputs: ModelInputs) -> ForwardBatch:
        seen.append(ForwardBatch.of(inputs))
        return seen[-1]

    monkeypatch.setattr(model, "forward_batch", forward_batch)
    runner._graphs = DecodeGraphs(model, runner._storage, 4, 256, capture_tape)
    own = TextGenerationPipeline(LocalExecutor([runner]), pipeline.kv_manager)
    execute(own, [make_context(random_prompt(9), max_new_tokens=3)], num_steps=3)
    recorded = next(batch for batch in seen if len(batch.tokens) == 1)
    before = {name: value.clone() for name, value in tensors_of(recorded)}

    num_calls = len(seen)
    context = make_context(random_prompt(30, seed=3), max_new_tokens=9)
    execute(own, [context], num_steps=9)
    assert len(seen) == num_calls + 1, "only the prompt's step called the network"
    assert context.tokens.generated.tolist() == lab.greedy(random_prompt(30, seed=3), 9)

    position = 30 + 9 - 2  # of the last token that was an input
    table = context.block_table[: position // 4 + 1].tolist()
    now = dict(tensors_of(recorded))
    assert now["tokens"].tolist() == context.tokens.generated[-2:-1].tolist()
    assert now["positions"].tolist() == [position]
    assert now["kv.cache_lengths"].tolist() == [position]
    assert now["kv.block_tables"][0, : len(table)].tolist() == table
    assert now["kv.slot_mapping"].tolist() == [table[-1] * 4 + position % 4]
    assert torch.equal(now["cos_sin"], model.network.rotary(torch.tensor([position])))
    same = {"qo_indptr", "logit_indices"}  # of one row always [0, 1] and [0]
    assert {name for name in now if torch.equal(now[name], before[name])} == same
    own.release(context.request_id)


def tensors_of(batch: ForwardBatch) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each tensor field; those of the cache inputs with `kv.` before them."""
    for prefix, part in (("", batch), ("kv.", batch.kv)):
        for field in dataclasses.fields(part):
            if isinstance(value := getattr(part, field.name), torch.Tensor):
                yield prefix + field.name, value
