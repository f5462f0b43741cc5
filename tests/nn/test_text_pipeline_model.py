"""What all decoder-only families share: ragged token inputs, the supported length, whether ranks can cut the heads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from max_ray.distributed import TPGroup
from max_ray.errors import ConfigError, ParallelismError
from max_ray.huggingface import HuggingFaceConfig
from max_ray.interfaces import (
    KVCacheInputs,
    ModelInputs,
    ModelOutputs,
    RequestID,
    RunRow,
    SamplingParams,
    TextContext,
    TokenBuffer,
)
from max_ray.modeling.text_pipeline_model import TextPipelineModel, spans

CPU = torch.device("cpu")


class NoNetwork(TextPipelineModel):
    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        raise NotImplementedError


def model() -> NoNetwork:
    return NoNetwork(None, None, None, CPU, TPGroup.single(), None)  # type: ignore[arg-type]


def row(tokens: list[int], processed: int, *, samples: bool = True, echo: bool = False) -> RunRow:
    return RunRow(
        request_id="r",
        active_tokens=np.array(tokens, dtype=np.int64),
        processed_length=processed,
        block_table=np.empty(0, dtype=np.int32),
        max_new_tokens=int(samples),
        sampling_params=SamplingParams(),
        stop_ids=frozenset(),
        generated_length=0,
        prompt_length=processed + len(tokens),
        echo=echo,
    )


def naive(rows: list[RunRow]) -> dict[str, list[int]]:
    """The same, one token at a time."""
    out: dict[str, list[int]] = {"tokens": [], "positions": [], "qo_indptr": [0], "logit_indices": []}
    for r in rows:
        for i, token in enumerate(r.active_tokens.tolist()):
            if i >= len(r.active_tokens) - r.num_logits:
                out["logit_indices"].append(len(out["tokens"]))
            out["tokens"].append(token)
            out["positions"].append(r.processed_length + i)
        out["qo_indptr"].append(len(out["tokens"]))
    return out


def check(rows: list[RunRow]) -> None:
    inputs = model().prepare_initial_token_inputs(rows)
    for name, expected in naive(rows).items():
        assert getattr(inputs, name).tolist() == expected, name
    assert inputs.tokens.dtype == inputs.positions.dtype == inputs.logit_indices.dtype == torch.int64
    assert inputs.qo_indptr.dtype == torch.int32


def test_prefill_chunk_decode_and_echo_side_by_side() -> None:
    check([row([5, 6, 7], 0), row([8, 9], 16, samples=False), row([3], 40), row([1, 2], 2, echo=True)])


def test_a_batch_of_chunks_wants_no_logits() -> None:
    inputs = model().prepare_initial_token_inputs([row([1, 2], 0, samples=False), row([3], 4, samples=False)])
    assert inputs.logit_indices.tolist() == []


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 99), min_size=1, max_size=6), st.integers(0, 50), st.booleans(), st.booleans()
        ),
        min_size=1,
        max_size=8,
    )
)
def test_random_batches_equal_the_naive_layout(batch: list[tuple[list[int], int, bool, bool]]) -> None:
    check([row(tokens, start, samples=samples, echo=echo) for tokens, start, samples, echo in batch])


def test_an_empty_row_is_our_fault() -> None:
    with pytest.raises(AssertionError, match="at least one token"):
        model().prepare_initial_token_inputs([row([1], 0), row([], 3)])


def test_contexts_want_their_last_logits() -> None:
    context = TextContext(request_id=RequestID("a"), tokens=TokenBuffer([4, 5, 6]), max_length=9)
    inputs = model().prepare_initial_token_inputs([context], return_n_logits=2)  # type: ignore[list-item]
    assert inputs.logit_indices.tolist() == [1, 2]
    assert model().prepare_initial_token_inputs([context], return_n_logits=9).logit_indices.tolist() == [0, 1, 2]  # type: ignore[list-item]


def test_next_inputs_follow_the_cache() -> None:
    kv = KVCacheInputs(
        keys=[],
        values=[],
        block_tables=torch.zeros(2, 1, dtype=torch.int32),
        cache_lengths=torch.tensor([7, 3], dtype=torch.int32),
        slot_mapping=torch.zeros(2, dtype=torch.int64),
        max_kv_length=8,
        page_size=16,
    )
    first = model().prepare_initial_token_inputs([row([1] * 7, 0), row([2] * 3, 0)], kv)
    following = model().prepare_next_token_inputs(torch.tensor([50, 60]), first)
    assert following.tokens.tolist() == [50, 60]
    assert following.positions.tolist() == [7, 3]
    assert following.positions.dtype == torch.int64
    assert following.qo_indptr.tolist() == [0, 1, 2]
    assert following.logit_indices.tolist() == [0, 1]
    assert following.kv_cache_inputs is kv


def test_spans() -> None:
    assert spans(np.array([3, 0, 9]), np.array([2, 0, 3])).tolist() == [3, 4, 9, 10, 11]
    assert spans(np.array([3]), np.array([0])).tolist() == []


def huggingface(**values: Any) -> HuggingFaceConfig:
    defaults = {"num_attention_heads": 6, "intermediate_size": 12, "hidden_size": 48, "max_position_embeddings": 64}
    return HuggingFaceConfig({**defaults, **values})


def max_seq_len(max_length: int | None, **values: Any) -> int:
    return NoNetwork.calculate_max_seq_len(SimpleNamespace(max_length=max_length), huggingface(**values))  # type: ignore[arg-type]


def test_the_length_is_the_models_unless_less_is_asked_for() -> None:
    assert max_seq_len(None) == 64
    assert max_seq_len(64) == 64
    assert max_seq_len(1) == 1
    assert max_seq_len(None, rope_scaling={"type": "linear", "factor": 4.0}) == 256


def test_more_than_the_model_supports_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"max_length=65 exceeds what the model supports: 64 tokens"):
        max_seq_len(65)


def test_heads_that_the_ranks_do_not_divide() -> None:
    with pytest.raises(ParallelismError) as caught:
        NoNetwork.check_tensor_parallel(huggingface(), 4)
    assert str(caught.value) == (
        "num_attention_heads=6 cannot be divided over tensor_parallel_size=4; sizes that work: 1, 2, 3, 6"
    )


@pytest.mark.parametrize(
    ("values", "culprit", "working"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads=2", "1, 2, 6"),
        ({"intermediate_size": 4}, "intermediate_size=4", "1, 2"),
    ],
)
def test_other_things_that_three_ranks_do_not_divide(values: dict[str, int], culprit: str, working: str) -> None:
    with pytest.raises(ParallelismError, match=f"{culprit} cannot .*; sizes that work: {working}$"):
        NoNetwork.check_tensor_parallel(huggingface(**values), 3)
    NoNetwork.check_tensor_parallel(huggingface(**values), 2)


def test_one_kv_head_goes_with_any_size_that_divides_the_heads() -> None:
    for size in (1, 2, 3, 6):
        NoNetwork.check_tensor_parallel(huggingface(num_key_value_heads=1), size)


def test_a_missing_number_is_named() -> None:
    with pytest.raises(ConfigError, match="no 'num_attention_heads'"):
        NoNetwork.check_tensor_parallel(HuggingFaceConfig({}), 2)
