"""Tapes: a recorded function gives what the function itself gives, whatever its inputs hold; or recording is refused.

python -m pytest tests/kernels/test_tape.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from max_ray import kernels
from max_ray.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def replays_equal(function: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> bool:
    from max_ray.kernels.native.tape import record

    with torch.inference_mode():
        tape = record(function)
        for _ in range(3):
            for x in inputs:
                x.copy_(torch.randn(x.shape) * 10)
            replayed = tape().clone()
            if not torch.equal(replayed, function()):
                return False
    return True


def test_kernels_views_and_torch_operations_in_turn() -> None:
    weight, x = kernels.pack_weight(torch.randn(64, 32)), torch.randn(3, 32)
    assert weight is not None

    def function() -> torch.Tensor:
        y = weight.linear(x, None)
        gate, up = y.split([32, 32], dim=1)
        normed = kernels.rmsnorm(y, torch.ones(64), 1e-5)
        silu = kernels.silu_and_mul(torch.cat([gate, up], 1))
        return (normed.view(6, 32).t()[:, :3].t() + silu).argmax(1)

    assert replays_equal(function, x)


def test_operations_that_give_their_input_back_or_a_copy() -> None:
    x, lengths = torch.randn(4, 6), torch.tensor([1, 2, 3, 4], dtype=torch.int32)

    def function() -> torch.Tensor:
        lengths.copy_(x[:, 0])
        same, copied = x.to(torch.float32), lengths.to(torch.int64)
        return same.t().reshape(24).unflatten(0, (6, 4)).flatten(0) + copied.repeat(6) + x.contiguous().sum()

    assert replays_equal(function, x)


def test_in_place_operations_and_several_results() -> None:
    x = torch.randn(5, 4)

    def function() -> torch.Tensor:
        values, indices = x.topk(2, dim=1)
        y = torch.zeros(5, 2)
        y.add_(values).mul_(indices)
        return y

    assert replays_equal(function, x)


def test_constants_are_made_once_and_not_written() -> None:
    from max_ray.kernels.native.tape import NotRecordableError, record

    x = torch.randn(4)
    assert replays_equal(lambda: x * torch.arange(4), x)
    with pytest.raises(NotRecordableError, match="constant"):
        record(lambda: torch.arange(4).add_(x.long()))


@pytest.mark.parametrize(
    "reader",
    [
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: int(x[0]),
        lambda x: float(x[0]),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x + 1),
    ],
)
def test_reading_a_number_is_refused(reader: Callable[[torch.Tensor], object]) -> None:
    from max_ray.kernels.native.tape import NotRecordableError, record

    def function() -> torch.Tensor:
        reader(x)
        return x

    x = torch.randn(4)
    with pytest.raises(NotRecordableError, match="reads a tensor"), torch.inference_mode():
        record(function)
    assert torch.equal(kernels.rmsnorm(x[None], torch.ones(4), 1e-5), native.rmsnorm(x[None], torch.ones(4), 1e-5))


def test_the_recording_has_run_the_function_and_knows_its_memory() -> None:
    from max_ray.kernels.native.tape import record

    x = torch.randn(4, 16)
    tape = record(lambda: kernels.rmsnorm(x, torch.ones(16), 1e-5).view(64) + 1)
    assert torch.equal(tape.output, kernels.rmsnorm(x, torch.ones(16), 1e-5).view(64) + 1)
    assert tape.nbytes == (64 + 16 + 64) * 4, "the norm's result, its weight, the sum; x is not the tape's"


def test_other_threads_are_not_recorded() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from max_ray.kernels.native.tape import record

    x, weight = torch.randn(2, 16), torch.ones(16)
    with ThreadPoolExecutor(1) as other:

        def function() -> torch.Tensor:
            other.submit(kernels.rmsnorm, x, weight, 1e-5).result()
            return kernels.rmsnorm(x, weight, 1e-5)

        assert len(record(function)) == 1
