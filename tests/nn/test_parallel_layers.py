"""The layers that are cut over ranks: what each rank reads, and that the ranks together give the whole result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from max_ray.distributed import TPGroup
from max_ray.nn import (
    ColumnParallelLinear,
    GatedMLP,
    MergedColumnParallelLinear,
    Module,
    ParallelLMHead,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from max_ray.nn.embedding import vocab_range
from max_ray.nn.linear import kv_head_range
from max_ray.weights import DictWeightSource, NameMap, load_weights
from tests.nn.ranks import cut, run_ranks


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def load(module: Module, tensors: dict[str, torch.Tensor]) -> None:
    """`tensors` under own names, parts as "weight:q"."""
    names = NameMap([(name, name) for name in tensors])
    load_weights(module.sharded_parameters(), DictWeightSource(tensors), names)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_column_parallel_ranks_side_by_side_are_the_whole(size: int) -> None:
    weight, bias, x = tensor(6, 4), tensor(6, seed=1), tensor(5, 4, seed=2)
    outputs = []
    for tp in cut(size):
        layer = ColumnParallelLinear(4, 6, tp, bias=True)
        load(layer, {"weight": weight, "bias": bias})
        outputs.append(layer(x))
    torch.testing.assert_close(torch.cat(outputs, -1), F.linear(x, weight, bias))


@pytest.mark.parametrize("size", [1, 2])
def test_merged_columns_keep_parts_apart(size: int) -> None:
    gate, up, x = tensor(4, 3), tensor(4, 3, seed=1), tensor(2, 3, seed=2)
    gates, ups = [], []
    for tp in cut(size):
        layer = MergedColumnParallelLinear(3, {"gate": 4, "up": 4}, tp)
        load(layer, {"weight:gate": gate, "weight:up": up})
        left, right = layer(x).chunk(2, -1)
        gates.append(left)
        ups.append(right)
    torch.testing.assert_close(torch.cat(gates, -1), x @ gate.T)
    torch.testing.assert_close(torch.cat(ups, -1), x @ up.T)


@pytest.mark.parametrize(("size", "num_kv_heads"), [(1, 2), (2, 2), (2, 1), (4, 2), (4, 1), (4, 4)])
def test_qkv_gives_each_rank_its_heads_and_the_kv_head_they_read(size: int, num_kv_heads: int) -> None:
    num_heads, head_dim, dim = 4, 2, 3
    q, k, v = (tensor(n * head_dim, dim, seed=n + i) for i, n in enumerate((num_heads, num_kv_heads, num_kv_heads)))
    biases = [tensor(len(w), seed=9 + i) for i, w in enumerate((q, k, v))]
    x = tensor(5, dim, seed=20)
    whole = [
        F.linear(x, w, b).unflatten(-1, (-1, head_dim)) for w, b in zip((q, k, v), biases, strict=True)
    ]  # [T, heads, head_dim]
    for tp in cut(size):
        layer = QKVParallelLinear(dim, num_heads, num_kv_heads, head_dim, tp, bias=True)
        load(
            layer,
            {f"weight:{p}": w for p, w in zip("qkv", (q, k, v), strict=True)}
            | {f"bias:{p}": b for p, b in zip("qkv", biases, strict=True)},
        )
        counts = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
        ours = layer(x).unflatten(-1, (-1, head_dim)).split(counts, dim=1)
        for i in range(layer.num_heads):
            head = tp.rank * num_heads // size + i
            torch.testing.assert_close(ours[0][:, i], whole[0][:, head])
            kv_whole = head * num_kv_heads // num_heads  # the KV head that this query head reads in the whole model
            kv_local = i * layer.num_kv_heads // layer.num_heads  # and here
            torch.testing.assert_close(ours[1][:, kv_local], whole[1][:, kv_whole])
            torch.testing.assert_close(ours[2][:, kv_local], whole[2][:, kv_whole])


def test_kv_heads_that_can_be_neither_cut_nor_replicated_evenly() -> None:
    with pytest.raises(AssertionError, match="replicated evenly"):
        kv_head_range(2, TPGroup(0, 3, torch.device("cpu")))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_row_parallel_sums_and_adds_its_bias_once(size: int, bias: bool) -> None:
    weight, x = tensor(4, 6), tensor(5, 6, seed=2)
    tensors = {"weight": weight} | ({"bias": tensor(4, seed=1)} if bias else {})

    def rank(tp: TPGroup) -> torch.Tensor:
        layer = RowParallelLinear(6, 4, tp, bias=bias)
        load(layer, tensors)
        return layer(x.chunk(tp.size, -1)[tp.rank])

    for output in run_ranks(size, rank):
        torch.testing.assert_close(output, F.linear(x, weight, tensors.get("bias")))


@pytest.mark.parametrize(("vocab_size", "size"), [(97, 1), (97, 2), (8, 2), (97, 3), (3, 2), (2, 3)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_the_ranks_do_not_divide(vocab_size: int, size: int, tied: bool) -> None:
    embed, head = tensor(vocab_size, 4), tensor(vocab_size, 4, seed=1)
    tokens = torch.cat([torch.arange(vocab_size), torch.tensor([0, vocab_size - 1])])

    def rank(tp: TPGroup) -> tuple[torch.Tensor, torch.Tensor]:
        class Net(Module):
            def __init__(self) -> None:
                self.embed = VocabParallelEmbedding(vocab_size, 4, tp)
                self.head = ParallelLMHead(vocab_size, 4, tp, tied_to=self.embed if tied else None)

        net = Net()
        load(net, {"embed.weight": embed} | ({} if tied else {"head.weight": head}))
        rows = net.embed(tokens)
        return rows, net.head(rows)

    for rows, logits in run_ranks(size, rank):
        assert torch.equal(rows, embed[tokens])
        torch.testing.assert_close(logits, embed[tokens] @ (embed if tied else head).T)


def test_no_logits_wanted_is_an_empty_answer() -> None:
    for logits in run_ranks(2, lambda tp: ParallelLMHead(5, 4, tp)(torch.empty(0, 4))):
        assert logits.shape == (0, 5)


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 8, 97])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_vocabulary_ranges_cover_each_id_once(vocab_size: int, size: int) -> None:
    assert [i for tp in cut(size) for i in vocab_range(vocab_size, tp)] == list(range(vocab_size))


@pytest.mark.parametrize("size", [1, 2])
def test_gated_mlp(size: int) -> None:
    gate, up, down, x = tensor(6, 4), tensor(6, 4, seed=1), tensor(4, 6, seed=2), tensor(3, 4, seed=3)

    def rank(tp: TPGroup) -> torch.Tensor:
        mlp = GatedMLP(4, 6, tp)
        load(mlp, {"gate_up.weight:gate": gate, "gate_up.weight:up": up, "down.weight": down})
        return mlp(x)

    for output in run_ranks(size, rank):
        torch.testing.assert_close(output, (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_rmsnorm_alone_and_fused() -> None:
    norm, x, residual = RMSNorm(8, 1e-5), tensor(3, 8), tensor(3, 8, seed=1)
    norm.weight.copy_(tensor(8, seed=2))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-5))
    normed, total = norm.add_and_norm(x, residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, norm(x + residual))


def test_a_rank_reads_only_its_share() -> None:
    whole = sum(p.data.numel() for _, p in GatedMLP(64, 256, cut(1)[0]).sharded_parameters())
    half = sum(p.data.numel() for _, p in GatedMLP(64, 256, cut(2)[1]).sharded_parameters())
    assert half * 2 == whole
