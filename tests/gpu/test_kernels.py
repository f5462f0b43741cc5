"""Each Triton kernel on the hardware against its reference: the cases of the interpreter, with tensors on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from max_ray.engine.sampling.device_draw import DeviceDraw
from max_ray.engine.sampling.draw import Filters, draw_filtered
from max_ray.engine.sampling.philox import uniforms
from max_ray.interfaces import SamplingParams
from max_ray.kernels import gpu
from tests.gpu.device import DEVICE
from tests.kernels.gpu.interpreted_attention import (  # noqa: F401
    test_decode_at_page_borders,
    test_few_tokens,
    test_head_dims,
    test_head_groups,
    test_prefill_at_page_borders,
    test_prefill_chunk_decode_and_empty_rows_share_a_batch,
    test_queries_may_be_a_view_of_a_projection,
    test_rows_at_the_borders_of_tiles,
    test_sliding_window,
    test_soft_cap,
    test_soft_cap_in_bfloat16,
    test_splits_beyond_a_rows_keys_count_nothing,
)
from tests.kernels.gpu.interpreted_elementwise import (  # noqa: F401
    test_append,
    test_fused_add_rmsnorm,
    test_rmsnorm,
    test_rmsnorm_of_a_view_and_with_a_float32_weight,
    test_rmsnorm_of_zeros_is_zero,
    test_rope,
    test_rope_and_append,
    test_rope_with_head_counts_that_do_not_fill_blocks,
    test_silu_and_mul,
    test_silu_of_large_values_does_not_overflow,
    test_sum_choices,
)
from tests.kernels.gpu.interpreted_latent import (  # noqa: F401
    test_a_prompt_in_chunks_is_near_to_the_whole_one,
    test_append_latent,
    test_latent_chunk_behind_a_cached_prefix,
    test_latent_decode_at_page_borders,
    test_latent_heads,
    test_latent_prefill_at_page_borders,
    test_latent_queries_may_be_a_view_of_a_projection,
    test_latent_splits_beyond_a_rows_keys_count_nothing,
    test_latent_widths,
    test_latents_of_few_tokens,
    test_latents_of_prefill_chunk_decode_and_empty_rows,
    test_latents_of_random_ragged_batches,
    test_splits_of_latents_wider_than_a_merging_program,
    test_the_same_splits_give_the_same_bits,
    test_tiles_of_gpus_with_less_shared_memory,
)
from tests.kernels.gpu.interpreted_quantized import (  # noqa: F401
    test_columns_at_the_borders_of_rounds_and_splits,
    test_columns_of_a_wider_matrix_and_rows_of_a_wider_input,
    test_dtypes,
    test_every_e4m3_code,
    test_fp8_with_half_a_group,
    test_groups_in_splits,
    test_groups_of_rows_with_a_matrix_each,
    test_kinds,
    test_one_large_input_does_not_drown_the_others,
    test_rows_of_inputs_at_the_borders_of_tiles,
    test_rows_of_the_matrix_at_the_borders_of_blocks,
    test_splits,
    test_unpacked_in_pieces,
)
from tests.kernels.gpu.interpreted_sinks import (  # noqa: F401
    test_a_sink_counts_once_whatever_the_splits,
    test_each_head_has_its_own_sink,
    test_sinks_far_below_and_above_the_scores,
    test_sinks_in_decode_at_page_borders,
    test_sinks_may_be_a_view,
    test_sinks_of_prefill_chunk_decode_and_empty_rows,
    test_sinks_of_random_ragged_batches,
    test_sinks_of_rows_of_several_queries_in_the_decode_kernel,
)

VOCAB_SIZE = 128_256
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"top_k": 200, "top_p": 0.95, "min_p": 0.001, "temperature": 0.7},
]


@pytest.fixture(autouse=True)
def _tensors_are_made_on_the_gpu() -> Iterator[None]:
    with DEVICE:
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws(filters: dict[str, Any], dtype: torch.dtype) -> None:
    """Equal to the reference implementation, but for the few draws that fall between two last bits of exp."""
    rows, device = 128, DEVICE
    logits = (torch.randn(rows, VOCAB_SIZE) * 3).to(dtype)
    params = [SamplingParams(**{"temperature": 1.0, "seed": seed} | filters) for seed in range(rows)]
    counters = np.arange(rows, dtype=np.int64)
    numbers = torch.from_numpy(uniforms([p.seed for p in params], counters, 1)[:, 0]).to(device)
    draw = DeviceDraw(gpu.sample, params, counters, VOCAB_SIZE, device)
    expected = draw_filtered(logits.float(), Filters.from_params(params, VOCAB_SIZE, device), numbers)
    assert int((draw(logits) != expected).sum()) <= 3
    numbers = torch.from_numpy(uniforms([p.seed for p in params], counters + 1, 1)[:, 0]).to(device)
    expected = draw_filtered(logits.float(), Filters.from_params(params, VOCAB_SIZE, device), numbers)
    assert int((draw(logits) != expected).sum()) <= 3, "the second draw of a row has the next number"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_greedy_rows_beside_drawn_ones(temperature: float) -> None:
    logits = torch.randn(8, 5000)
    params = [SamplingParams(temperature=temperature if row % 2 else 0.0, top_k=1, seed=row) for row in range(8)]
    draw = DeviceDraw(gpu.sample, params, np.zeros(8, dtype=np.int64), 5000, DEVICE)
    if temperature:
        assert torch.equal(draw(logits), logits.argmax(1)), "top-k 1 is greedy, too"
