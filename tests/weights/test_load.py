"""load_weights: shards, fused parts and padding; then everything that must be refused, before anything is touched.

python -m pytest tests/weights/test_load.py
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

from max_ray.errors import WeightsError
from max_ray.weights import DictWeightSource, NameMap, PartSpec, ShardedParameter, load_weights

PLAIN = NameMap(
    [("model.{}.weight", "{}.weight"), ("model.{}.q", "{}.qkv:q"), ("model.{}.k", "{}.qkv:k"), ("*.old", None)]
)


def plain(*shape: int, dtype: torch.dtype = torch.float32) -> ShardedParameter:
    return ShardedParameter(torch.full(shape, torch.nan, dtype=dtype), {"": PartSpec.whole(shape)})


def load(parameters: dict[str, ShardedParameter], tensors: dict[str, torch.Tensor]) -> object:
    return load_weights(iter(parameters.items()), DictWeightSource(tensors), PLAIN)


def test_plain_parameters_are_copied_and_counted() -> None:
    a, b = torch.randn(3, 4), torch.randn(())
    parameters = {"0.weight": plain(3, 4), "1.weight": plain()}
    report = load(parameters, {"model.0.weight": a, "model.1.weight": b, "x.old": torch.ones(9)})
    assert torch.equal(parameters["0.weight"].data, a)
    assert torch.equal(parameters["1.weight"].data, b)
    assert (report.num_parameters, report.num_tensors, report.nbytes_read) == (2, 2, 4 * 13)
    assert report.dropped == ("x.old",)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtypes_are_converted_as_torch_does(stored: torch.dtype, wanted: torch.dtype) -> None:
    tensor, parameter = torch.randn(5).to(stored), plain(5, dtype=wanted)
    load({"0.weight": parameter}, {"model.0.weight": tensor})
    assert parameter.data.dtype == wanted
    assert torch.equal(parameter.data, tensor.to(wanted))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_shards_of_all_ranks_make_the_whole(axis: int) -> None:
    tensor = torch.randn(6, 4)
    shards = []
    for rank in range(2):
        size = tensor.shape[axis] // 2
        spec = PartSpec((6, 4), axis, rank * size, (rank + 1) * size, 0)
        parameter = ShardedParameter(torch.full(spec.local_shape, torch.nan), {"": spec})
        report = load({"0.weight": parameter}, {"model.0.weight": tensor})
        assert report.nbytes_read == tensor.nbytes // 2
        shards.append(parameter.data)
    assert torch.equal(torch.cat(shards, axis), tensor)


def test_fused_parts_land_in_their_places_and_gaps_become_zero() -> None:
    q, k = torch.randn(4, 3), torch.randn(2, 3)
    data = torch.full((9, 3), torch.nan)
    parts = {"q": PartSpec((4, 3), 0, 2, 4, 1), "k": PartSpec((2, 3), 0, 0, 2, 5)}
    load({"0.qkv": ShardedParameter(data, parts)}, {"model.0.q": q, "model.0.k": k})
    zeros = torch.zeros
    assert torch.equal(data, torch.cat([zeros(1, 3), q[2:], zeros(2, 3), k, zeros(2, 3)]))


def test_fused_biases_that_every_rank_reads_whole() -> None:
    data = torch.full((5,), torch.nan)
    parts = {"q": PartSpec.whole((3,)), "k": PartSpec.whole((2,), dest_start=3)}
    load({"0.qkv": ShardedParameter(data, parts)}, {"model.0.q": torch.ones(3), "model.0.k": torch.full((2,), 2.0)})
    assert data.tolist() == [1, 1, 1, 2, 2]


def test_a_rank_that_holds_only_padding_is_zero() -> None:
    parameter = ShardedParameter(torch.full((4, 3), torch.nan), {"": PartSpec((5, 3), 0, 5, 5, 0)})
    report = load({"0.weight": parameter}, {"model.0.weight": torch.ones(5, 3)})
    assert torch.equal(parameter.data, torch.zeros(4, 3))
    assert report.nbytes_read == 0


def test_a_strided_parameter_is_filled_in_place() -> None:
    memory, tensor = torch.zeros(4, 3), torch.randn(3, 4)
    load({"0.weight": ShardedParameter(memory.T, {"": PartSpec.whole((3, 4))})}, {"model.0.weight": tensor})
    assert torch.equal(memory, tensor.T)


class OneAtATime(DictWeightSource):
    """Hands out fresh copies and counts how many are alive at once."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        piece = super().get_slice(name, axis, start, stop).clone()
        self.alive = [ref for ref in self.alive if ref() is not None]
        self.alive.append(weakref.ref(piece))
        self.most = max(self.most, len(self.alive))
        return piece


def test_no_more_than_one_tensor_is_held() -> None:
    source = OneAtATime({f"model.{i}.weight": torch.randn(4) for i in range(5)})
    load_weights([(f"{i}.weight", plain(4)) for i in range(5)], source, PLAIN)
    assert source.most == 1


# --- what is refused


def refused(parameters: dict[str, ShardedParameter], tensors: dict[str, torch.Tensor]) -> str:
    """The message; proves that no parameter was touched."""
    with pytest.raises(WeightsError) as raised:
        load(parameters, tensors)
    assert all(parameter.data.isnan().all() for parameter in parameters.values())
    return str(raised.value)


def test_a_missing_tensor_is_named_as_the_checkpoint_would() -> None:
    parameters = {"0.weight": plain(2), "1.weight": plain(2)}
    assert "lacks 1 tensor (model.1.weight)" in refused(parameters, {"model.0.weight": torch.ones(2)})


def test_a_missing_part_of_a_fused_parameter_is_named() -> None:
    parts = {"q": PartSpec((2,), 0, 0, 2, 0), "k": PartSpec((2,), 0, 0, 2, 2)}
    parameters = {"0.qkv": ShardedParameter(torch.full((4,), torch.nan), parts)}
    assert "lacks 1 tensor (model.0.k)" in refused(parameters, {"model.0.q": torch.ones(2)})


def test_left_over_tensors_are_named_whether_the_table_knows_them_or_not() -> None:
    tensors = {name: torch.ones(2) for name in ("model.0.weight", "model.9.weight", "stray")}
    assert "no place for 2 tensors (stray, model.9.weight)" in refused({"0.weight": plain(2)}, tensors)


def test_ten_of_many_are_named() -> None:
    message = refused({f"{i}.weight": plain(2) for i in range(25)}, {f"stray{i}": torch.ones(1) for i in range(11)})
    assert "lacks 25 tensors (model.0.weight, " in message
    assert "model.9.weight and 15 more)" in message
    assert "stray9 and 1 more)" in message
    assert "model.10.weight" not in message


def test_two_tensors_for_one_weight() -> None:
    table = NameMap([("a", "x"), ("b", "x")])
    parameter = plain(2)
    with pytest.raises(WeightsError, match=r"a and b are the same weight \(x\)"):
        load_weights([("x", parameter)], DictWeightSource({"a": torch.ones(2), "b": torch.ones(2)}), table)
    assert parameter.data.isnan().all()


@pytest.mark.parametrize("shape", [(3, 2), (2, 4), (2, 3, 1), (6,), ()])
def test_a_wrong_shape(shape: tuple[int, ...]) -> None:
    message = refused({"0.weight": plain(2, 3)}, {"model.0.weight": torch.ones(shape)})
    assert f"The shape of model.0.weight is {list(shape)} in the checkpoint, the network wants [2, 3]." in message


def test_integers_are_not_weights() -> None:
    tensors = {"model.0.weight": torch.ones(2, dtype=torch.int32)}
    assert "quantized checkpoint" in refused({"0.weight": plain(2)}, tensors)


def test_bugs_of_a_network_are_assertions() -> None:
    def parameters(*specs: PartSpec) -> Iterator[tuple[str, ShardedParameter]]:
        yield "0.qkv", ShardedParameter(torch.zeros(4, 2), dict(zip("qk", specs, strict=True)))

    source = DictWeightSource({"model.0.q": torch.ones(2, 2), "model.0.k": torch.ones(2, 2)})
    q = PartSpec((2, 2), 0, 0, 2, 0)
    with pytest.raises(AssertionError, match="overlap"):
        load_weights(parameters(q, PartSpec((2, 2), 0, 0, 2, 1)), source, PLAIN)
    with pytest.raises(AssertionError, match="reach to 5"):
        load_weights(parameters(q, PartSpec((2, 2), 0, 0, 2, 3)), source, PLAIN)
    with pytest.raises(AssertionError, match="one axis"):
        load_weights(parameters(q, PartSpec((2, 2), 1, 0, 2, 0)), source, PLAIN)
    with pytest.raises(AssertionError, match="two parameters"):
        load_weights([("0.weight", plain(2)), ("0.weight", plain(2))], source, PLAIN)
