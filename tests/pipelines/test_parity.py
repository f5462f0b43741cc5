"""Tokens and log probabilities equal Hugging Face's at the borders of pages, prefixes, batches, chunks and steps."""

from __future__ import annotations

import pytest
import torch

from max_ray.interfaces import GenerationStatus, TextGenerationOutput
from tests import naive
from tests.pipelines.conftest import Lab, execute, make_context, random_prompt, run_to_end

NUM_TOKENS = 10


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prefix", ["none", "partial", "full"])
@pytest.mark.parametrize("prompt_length", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("page_size", [1, 16])
def test_greedy_tokens_over_the_boundary_matrix(
    lab: Lab, page_size: int, prompt_length: int, prefix: str, batch_size: int
) -> None:
    pipeline = lab.pipeline(page_size)
    prompts = [random_prompt(prompt_length), random_prompt(prompt_length + 3), random_prompt(1)][:batch_size]
    shared = {"none": 0, "partial": prompt_length // 2, "full": prompt_length}[prefix]
    if shared:
        run_to_end(pipeline, [make_context(prompts[0][:shared], max_new_tokens=1)])
    contexts = [make_context(prompt, max_new_tokens=NUM_TOKENS) for prompt in prompts]
    outputs = run_to_end(pipeline, contexts)
    assert [output.tokens for output in outputs] == [lab.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    assert outputs[0].num_cached_tokens == min(shared, prompt_length - 1) // page_size * page_size
    assert all(output.final_status is GenerationStatus.MAXIMUM_LENGTH for output in outputs)
    assert pipeline.kv_manager.num_free_blocks == pipeline.kv_manager.total_num_blocks


@pytest.mark.parametrize("chunk", [1, 15, 16, 17, 39, 40])
@pytest.mark.parametrize("primed", [False, True])
def test_prompt_chunks_end_inside_on_and_after_a_page(lab: Lab, chunk: int, primed: bool) -> None:
    pipeline = lab.pipeline(16)
    prompt, decoding = random_prompt(40), make_context(random_prompt(5), max_new_tokens=60)
    if primed:
        run_to_end(pipeline, [make_context(prompt[:20], max_new_tokens=1)])
    context = make_context(prompt, max_new_tokens=NUM_TOKENS)
    tokens = []
    while not context.is_done:
        context.chunk(chunk)
        output, other = execute(pipeline, [context, decoding])
        assert len(other.tokens) == 1  # the decoding row loses no step to the chunks
        tokens += output.tokens
    assert tokens == lab.greedy(prompt, NUM_TOKENS)
    generated = decoding.tokens.generated.tolist()
    assert generated == lab.greedy(random_prompt(5), len(generated))


def test_prefill_chunk_and_decode_share_one_forward_pass(lab: Lab) -> None:
    pipeline = lab.pipeline()
    decoding, fresh, chunked = (make_context(random_prompt(n), max_new_tokens=20) for n in (3, 21, 30))
    execute(pipeline, [decoding])
    chunked.chunk(18)
    before = pipeline.executor.forward_calls
    outputs = execute(pipeline, [decoding, fresh, chunked])
    assert pipeline.executor.forward_calls == before + 1
    assert [len(output.tokens) for output in outputs] == [1, 1, 0]
    outputs = execute(pipeline, [decoding, fresh, chunked], num_steps=4)
    assert pipeline.executor.forward_calls == before + 5
    assert [len(output.tokens) for output in outputs] == [4, 4, 4]
    for context in (decoding, fresh, chunked):
        prompt, generated = context.tokens.prompt.tolist(), context.tokens.generated.tolist()
        assert generated == lab.greedy(prompt, len(generated))


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 8, 100])
def test_num_steps_do_not_change_the_tokens(lab: Lab, page_size: int, num_steps: int) -> None:
    """Rows end in the middle of a run: one by its end of sequence, one by its limit, one by a stop id."""
    prompts = [random_prompt(n, seed=1) for n in (14, 16, 3)]
    greedy = [lab.greedy(prompt, 20) for prompt in prompts]
    contexts = [
        make_context(prompts[0], max_new_tokens=20, eos=[greedy[0][4]]),
        make_context(prompts[1], max_new_tokens=20),
        make_context(prompts[2], max_new_tokens=20, stop_token_ids=(greedy[2][9], 10**6)),
    ]
    outputs = run_to_end(lab.pipeline(page_size), contexts, num_steps)
    ends = [greedy[0].index(greedy[0][4]) + 1, 20, greedy[2].index(greedy[2][9]) + 1]
    assert [output.tokens for output in outputs] == [tokens[:end] for tokens, end in zip(greedy, ends, strict=True)]
    assert [output.final_status for output in outputs] == [
        GenerationStatus.END_OF_SEQUENCE,
        GenerationStatus.MAXIMUM_LENGTH,
        GenerationStatus.END_OF_SEQUENCE,
    ]


@pytest.mark.parametrize("num_steps", [1, 8])
@pytest.mark.parametrize("prompt_length", [1, 254, 255])
def test_a_sequence_ends_at_the_maximum_length(lab: Lab, prompt_length: int, num_steps: int) -> None:
    prompt = random_prompt(prompt_length)
    max_length = 256 if prompt_length > 1 else 17
    context = make_context(prompt, max_length=max_length)
    (output,) = run_to_end(lab.pipeline(), [context], num_steps)
    assert output.tokens == lab.greedy(prompt, max_length - prompt_length)
    assert output.final_status is GenerationStatus.MAXIMUM_LENGTH


def test_ignore_eos_goes_on_and_stop_ids_still_end(lab: Lab) -> None:
    prompt = random_prompt(6)
    greedy = lab.greedy(prompt, 20)
    ignoring = make_context(prompt, max_new_tokens=20, eos=[greedy[2]], ignore_eos=True)
    stopping = make_context(prompt, max_new_tokens=20, eos=[greedy[2]], ignore_eos=True, stop_token_ids=(greedy[5],))
    outputs = run_to_end(lab.pipeline(), [ignoring, stopping])
    assert outputs[0].tokens == greedy
    assert outputs[1].tokens == greedy[: greedy.index(greedy[5]) + 1]


@pytest.mark.parametrize("num_steps", [1, 8])
@pytest.mark.parametrize("min_new_tokens", [0, 1, 5, 12])
def test_min_tokens_hold_back_the_end(lab: Lab, min_new_tokens: int, num_steps: int) -> None:
    prompt = random_prompt(9)
    eos = lab.greedy(prompt, 2)
    context = make_context(prompt, max_new_tokens=12, eos=eos, min_new_tokens=min_new_tokens)
    expected = naive.generate(
        lab.reference, prompt, context.sampling_params, max_new_tokens=12, stop_ids=context.stop_ids
    )
    (output,) = run_to_end(lab.pipeline(), [context], num_steps)
    assert output.tokens == expected.tokens
    assert len(output.tokens) >= min(12, max(1, min_new_tokens))


@pytest.mark.parametrize("prefix", [0, 17])
def test_log_probabilities_equal_the_reference(lab: Lab, prefix: int) -> None:
    pipeline = lab.pipeline()
    prompt = random_prompt(33)
    if prefix:
        run_to_end(pipeline, [make_context(prompt[:prefix], max_new_tokens=1)])
    silent = make_context(random_prompt(4), max_new_tokens=NUM_TOKENS)
    outputs = run_to_end(pipeline, [silent, make_context(prompt, max_new_tokens=NUM_TOKENS, logprobs=5)], 4)
    assert outputs[0].log_probabilities is None
    check_log_probabilities(lab, prompt, outputs[1])


def check_log_probabilities(lab: Lab, prompt: list[int], output: TextGenerationOutput) -> None:
    assert output.log_probabilities is not None
    assert [entry.token_id for entry in output.log_probabilities] == output.tokens
    expected = naive.all_logits(lab.reference, [*prompt, *output.tokens]).log_softmax(1)[len(prompt) - 1 :]
    for entry, line in zip(output.log_probabilities, expected[:-1], strict=True):
        values, ids = line.topk(5)
        assert entry.log_probability == pytest.approx(line[entry.token_id].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("chunk", [None, 1, 7, 16])
@pytest.mark.parametrize("prompt_length", [1, 2, 16, 33])
def test_echo_reports_the_whole_prompt_also_in_chunks_and_after_a_hit(
    lab: Lab, prompt_length: int, chunk: int | None
) -> None:
    pipeline = lab.pipeline()
    prompt = random_prompt(prompt_length)
    run_to_end(pipeline, [make_context(prompt, max_new_tokens=1)])  # would be a prefix hit
    context = make_context(prompt, max_new_tokens=3, logprobs=2, echo=True)
    other = make_context(random_prompt(8), max_new_tokens=50, logprobs=0)
    merged = None
    while not context.is_done:
        if chunk:
            context.chunk(chunk)
        output = execute(pipeline, [other, context])[1]
        if merged is None:
            merged = output
        else:
            merged.merge(output)
    assert merged is not None
    assert merged.tokens == lab.greedy(prompt, 3)
    entries = merged.prompt_log_probabilities
    assert entries is not None
    assert len(entries) == prompt_length
    assert entries[0] is None
    expected = naive.all_logits(lab.reference, prompt).log_softmax(1)
    for token, line, entry in zip(prompt[1:], expected, entries[1:], strict=False):
        assert entry is not None
        assert entry.token_id == token
        assert entry.log_probability == pytest.approx(line[token].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == line.topk(2).indices.tolist()
    assert merged.log_probabilities is not None
    assert len(merged.log_probabilities) == 3


def test_logits_equal_the_reference(lab: Lab) -> None:
    """Through log probabilities of the whole vocabulary: equal up to the constant that softmax takes away."""
    prompt = random_prompt(20)
    (output,) = run_to_end(lab.pipeline(), [make_context(prompt, max_new_tokens=4, logprobs=272)])
    assert output.log_probabilities is not None
    reference = naive.all_logits(lab.reference, [*prompt, *output.tokens])[len(prompt) - 1 : -1].log_softmax(1)
    ours = torch.tensor([[value for _, value in sorted(entry.top)] for entry in output.log_probabilities])
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)
