"""Module and Linear: the seed page's example, discovery of parameters, moving, errors."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from max_ray.driver import CPU, Accelerator, accelerator_count
from max_ray.errors import DeviceError
from max_ray.nn import Linear, Module
from max_ray.weights.parameter import PartSpec


class MLP(Module):
    fc1: Linear
    fc2: Linear

    def forward(self, x):
        return self.fc2(self.fc1(x))


def test_the_seed_pages_example_prints_as_printed_there() -> None:
    model = MLP(fc1=Linear(10, 20), fc2=Linear(20, 5))
    lines = [f"{name}: {param.shape}" for name, param in model.parameters]
    assert lines == ["fc1.weight: [20, 10]", "fc1.bias: [20]", "fc2.weight: [5, 20]", "fc2.bias: [5]"]
    assert model.to(CPU()) is model
    assert model(torch.ones(3, 10)).shape == (3, 5)


def test_parameters_can_be_iterated_twice() -> None:
    model = MLP(fc1=Linear(2, 2), fc2=Linear(2, 2))
    assert [n for n, _ in model.parameters] == [n for n, _ in model.parameters] != []


@pytest.mark.skipif(accelerator_count() > 0, reason="this machine has a GPU")
def test_an_accelerator_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(DeviceError, match=r"Accelerator\(0\) does not exist: .* Use CPU\(\)"):
        Accelerator()


def test_there_is_one_cpu() -> None:
    assert str(CPU()) == "cpu:0"
    with pytest.raises(DeviceError, match="CPU device 1"):
        CPU(1)


def test_linear_is_torchs() -> None:
    torch.manual_seed(0)
    ours, x = Linear(7, 5), torch.randn(2, 3, 7)
    theirs = torch.nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_linear_starts_with_usable_weights() -> None:
    layer = Linear(100, 50, dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert 0.05 < layer.weight.float().std() < 0.065  # uniform in +-0.1: 0.0577
    assert layer.weight.abs().max() <= 0.1001
    assert [name for name, _ in Linear(3, 2, bias=False).parameters] == ["weight"]


def test_keywords_are_checked() -> None:
    with pytest.raises(TypeError, match="MLP needs fc2"):
        MLP(fc1=Linear(1, 1))
    with pytest.raises(TypeError, match=r"no attribute 'fc3'.* Did you mean"):
        MLP(fc1=Linear(1, 1), fc2=Linear(1, 1), fc3=Linear(1, 1))


def test_defaults_class_variables_and_inheritance() -> None:
    class Deep(MLP):
        kind: ClassVar[str] = "deep"
        scale: float = 2.0
        fc3: Linear

        def forward(self, x):
            return self.fc3(super().forward(x)) * self.scale

    model = Deep(fc1=Linear(2, 3), fc2=Linear(3, 4), fc3=Linear(4, 1, bias=False))
    assert [name for name, _ in model.parameters][-1] == "fc3.weight"
    doubled = model(torch.ones(1, 2))
    model.scale = 1.0
    torch.testing.assert_close(doubled, 2 * model(torch.ones(1, 2)))


def test_nested_modules_lists_and_dicts_are_searched_and_shared_ones_counted_once() -> None:
    class Net(Module):
        def __init__(self) -> None:
            shared = Linear(2, 2, bias=False)
            self.first = shared
            self.blocks = [MLP(fc1=Linear(2, 2, bias=False), fc2=shared), (Linear(2, 2, bias=False),)]
            self.heads = {"a": Linear(2, 1, bias=False)}
            self._private = Linear(9, 9)

    names = [name for name, _ in Net().parameters]
    assert names == ["first.weight", "blocks.0.fc1.weight", "blocks.1.0.weight", "heads.a.weight"]


def test_to_moves_parameters_and_plain_tables_and_keeps_sharing() -> None:
    class Net(Module):
        def __init__(self) -> None:
            self.a = Linear(2, 2)
            self.table = torch.zeros(3)
            self.same = self.table

    net = Net().to(torch.device("meta"))
    assert {p.device.type for _, p in net.parameters} == {"meta"}
    assert net.table.device.type == "meta"
    assert net.table is net.same


def test_state_dict_round_trip_and_misfits() -> None:
    one, two = MLP(fc1=Linear(2, 3), fc2=Linear(3, 1)), MLP(fc1=Linear(2, 3), fc2=Linear(3, 1))
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(one(x), two(x))
    state = one.state_dict()
    with pytest.raises(ValueError, match=r"missing \['fc2.bias'\]"):
        two.load_state_dict({k: v for k, v in state.items() if k != "fc2.bias"})
    with pytest.raises(ValueError, match=r"unknown \['x'\]"):
        two.load_state_dict({**state, "x": x})
    with pytest.raises(ValueError, match=r"fc1.bias is \[4\], MLP has \[3\]"):
        two.load_state_dict({**state, "fc1.bias": torch.zeros(4)})


def test_a_module_without_forward_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Module has no forward"):
        Module()(1)


def test_sharded_parameters_are_the_memory_itself() -> None:
    layer = Linear(2, 3)
    parameters = dict(layer.sharded_parameters())
    assert parameters["weight"].parts == {"": PartSpec.whole((3, 2))}
    parameters["weight"].data.fill_(0)
    assert layer.weight.abs().sum() == 0
