"""The size of a GPU's cache, with a device that stands for it; one place for the logits of all buckets."""

from __future__ import annotations

import pytest
import torch

from max_ray.engine.device_memory import StepMemory, measure
from max_ray.engine.graphs import DecodeGraphs, Replay
from max_ray.engine.warm_up import WarmUp
from tests.checkpoints import make_llama
from tests.gpu.models import Lab, request, tokens_of


class Device:
    """Memory that is used and given back."""

    def __init__(self, total: int, used: int) -> None:
        self.total, self.used, self.most, self._before = total, used, used, 0

    def take(self, nbytes: int, *, keeps: bool) -> None:
        self.most = max(self.most, self.used + nbytes)
        self.used += nbytes if keeps else 0

    def info(self) -> tuple[int, int]:
        return self.total - self.used, self.total

    def watch(self) -> None:
        self._before = self.most = self.used

    def largest(self) -> int:
        return self.most - self._before


@pytest.mark.parametrize(
    ("costs", "graphs"),
    [([50, 4, 4, 4], 62), ([50], 50), ([], 0), ([7, 7, 7], 21)],
    ids=["shared", "one", "none", "own"],
)
def test_a_step_and_the_graphs_are_measured(costs: list[int], graphs: int) -> None:
    device, captured = Device(1000, 300), list[int]()

    def capture(number: int) -> None:
        captured.append(number)
        device.take(costs[number], keeps=True)

    device.most = 999  # of loading
    needed = measure(device, lambda: device.take(120, keeps=False), capture, len(costs))
    assert needed == StepMemory(120, graphs)
    assert captured == list(range(min(2, len(costs))))


def test_what_is_left_for_the_cache() -> None:
    needed = StepMemory(step=100, graphs=20)
    assert needed.left_for_cache(700, 1000, 0.95) == 700 - 50 - 120
    assert needed.left_for_cache(700, 1000, 1.0) == 580
    assert needed.left_for_cache(160, 1000, 0.95) == 0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(make_llama(tmp_path_factory.mktemp("m") / "m", tokenizer=False), torch.device("cpu"))


def test_the_largest_step_has_all_tokens_and_all_logits(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    execute = lab.model.execute

    def noted(inputs: object) -> object:
        outputs = execute(inputs)  # type: ignore[arg-type]
        seen.append(tuple(outputs.logits.shape))
        return outputs

    monkeypatch.setattr(lab.model, "execute", noted)
    warm_up = WarmUp(lab.model, lab.storage, lab.runner(None, 0), 64, 300)
    warm_up.largest_step()
    assert seen == [(300, lab.vocab_size)]
    warm_up.compile_all()
    assert max(seen)[0] == 300, "no step is larger"


def test_a_step_is_cut_to_the_cache(lab: Lab) -> None:
    most = lab.storage.num_blocks * lab.storage.page_size
    warm_up = WarmUp(lab.model, lab.storage, lab.runner(None, 0), 1000, 10 * most)
    assert sum(warm_up._cut(10 * most)) == most


def test_all_buckets_write_their_logits_to_one_place(lab: Lab) -> None:
    def capture(function: object) -> Replay:
        output = function()  # type: ignore[operator]

        def again() -> torch.Tensor:
            output.copy_(function())  # type: ignore[operator]
            return output

        return Replay(again)

    graphs = DecodeGraphs(lab.model, lab.storage, 12, 256, capture, shares_output=True)
    graphs.capture_all()
    with torch.inference_mode():
        outputs = {bucket: graphs._replays[bucket]() for bucket in graphs.buckets}
    places = {output.untyped_storage().data_ptr() for output in outputs.values()}
    assert len(places) == 1
    assert {bucket: len(output) for bucket, output in outputs.items()} == {bucket: bucket for bucket in graphs.buckets}


def test_tokens_are_the_same_with_one_place(lab: Lab) -> None:
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    expected = tokens_of(lab.runner(None, 0), request(prompts, 6, [{}]))
    runner = lab.runner(Replay, 0)
    assert runner._graphs is not None
    runner._graphs._shares_output = True
    for rows in (3, 1, 2, 3):
        assert tokens_of(runner, request(prompts[:rows], 6, [{}])) == expected[:rows]
