"""Weights packed while they are read are the weights that are read and then packed, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from max_ray import kernels
from max_ray.distributed import TPGroup
from max_ray.errors import WeightsError
from max_ray.kernels.native import PackedWeight
from max_ray.modeling import load_network, packed_loading
from max_ray.nn import (
    Linear,
    MergedColumnParallelLinear,
    Module,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    pack_weights,
)
from max_ray.weights import NameMap, SafetensorsSource, load_weights
from tests.nn.ranks import cut

pytestmark = pytest.mark.skipif(not kernels.has_native(), reason="weights are packed for the C++ kernels")

Shapes = dict[str, tuple[int, int]]


class Net(Module):
    """A layer of every kind. vocab: with padding rows on the last rank where it is odd."""

    def __init__(self, dim: int, heads: int, kv_heads: int, width: int, vocab: int, tied: bool, tp: TPGroup) -> None:
        bf16: Any = {"dtype": torch.bfloat16}
        self.embed = VocabParallelEmbedding(vocab, dim, tp, **bf16)
        self.qkv = QKVParallelLinear(dim, heads, kv_heads, 16, tp, bias=True, **bf16)
        self.gate_up = MergedColumnParallelLinear(dim, {"gate": width, "up": width}, tp, **bf16)
        self.down = RowParallelLinear(width, dim, tp, **bf16)
        self.plain = Linear(dim, 7, bias=False, **bf16)
        self.head = ParallelLMHead(vocab, dim, tp, tied_to=self.embed if tied else None, **bf16)


def checkpoint(net: Module, folder: Path, dtype: torch.dtype) -> SafetensorsSource:
    tensors = {}
    for name, parameter in net.sharded_parameters():
        for part, spec in parameter.parts.items():
            tensors[f"{name}:{part}" if part else name] = torch.randn(spec.checkpoint_shape).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    return SafetensorsSource([folder / "model.safetensors"])


def names(source: SafetensorsSource) -> NameMap:
    return NameMap([(name, name) for name in source.names()])


def weights(net: Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in net.named_modules():
        weight = module.__dict__.get("weight")
        if weight is not None:
            yield prefix, weight.data if isinstance(weight, PackedWeight) else weight


def compare(make: Any, folder: Path, dtype: torch.dtype) -> set[str]:
    """Both ways; gives the modules whose weight `load_network` packed."""
    source = checkpoint(make(), folder, dtype)
    fused, naive = make(), make()
    report = load_network(fused, source, names(source))
    assert report == load_weights(naive.sharded_parameters(), source, names(source))
    packed = {
        prefix for prefix, module in fused.named_modules() if isinstance(vars(module).get("weight"), PackedWeight)
    }
    pack_weights(fused)
    pack_weights(naive)
    ours, theirs = dict(weights(fused)), dict(weights(naive))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight.view(torch.int16), theirs[name].view(torch.int16)), name
    for prefix, module in fused.named_modules():
        assert type(vars(module).get("weight")) is type(vars(dict(naive.named_modules())[prefix]).get("weight"))
    return packed


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_every_layer_that_is_packed_later_is_packed_while_it_is_read(tmp_path: Path, size: int, tied: bool) -> None:
    for tp in cut(size):
        packed = compare(lambda tp=tp: Net(64, 4, 2, 96, 101, tied, tp), tmp_path, torch.bfloat16)
        assert packed == {"qkv.", "gate_up.", "down.", "plain."} | ({"embed."} if tied else {"head."})


def test_random_shapes_chunks_and_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(3)
    for case in range(60):
        monkeypatch.setattr(packed_loading, "CHUNK_BYTES", random.choice([1, 3000, 1 << 19]))
        monkeypatch.setattr(packed_loading, "_STRETCH_BYTES", random.choice([1, 9000, 1 << 22]))
        size = random.choice([1, 2, 3])
        heads = size * random.randint(1, 3)
        shape = (random.choice([24, 33, 64]), heads, heads, size * random.randint(1, 70), random.randint(4, 130))
        tied = random.random() < 0.5
        tp = random.choice(cut(size))
        dtype = random.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        (folder := tmp_path / str(case)).mkdir()
        packed = compare(lambda: Net(*shape, tied, tp), folder, dtype)  # noqa: B023
        assert packed >= {"down.", "plain."}


def test_parts_that_begin_within_a_panel_are_packed_afterwards(tmp_path: Path) -> None:
    tp = TPGroup.single(torch.device("cpu"))
    make = lambda: MergedColumnParallelLinear(32, {"gate": 24, "up": 24}, tp, dtype=torch.bfloat16)  # noqa: E731
    assert compare(make, tmp_path, torch.bfloat16) == set()


def test_a_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    net = Net(64, 4, 2, 96, 100, False, TPGroup.single(torch.device("cpu")))
    source = checkpoint(net, tmp_path, torch.bfloat16)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="shorter while it was read"):
        load_network(net, source, names(source))
