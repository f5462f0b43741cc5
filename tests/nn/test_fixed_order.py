"""No layer adds floats by index: on a GPU that is atomic, in another order in every run."""

from __future__ import annotations

import ast

import pytest
import torch

from max_ray.nn import run_by_expert, softmax_top_k
from tests.source_tree import sources

LAYERS = ("max_ray.nn", "max_ray.modeling", "max_ray.engine.pooling_head", "max_ray.engine.score_head", "architectures")
ADDS = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_reduce", "index_reduce_"}
ALLOWED = {
    ("max_ray.nn.moe", "counts.scatter_add_"),  # int64
    ("max_ray.engine.pooling_head", "sums.index_add_"),  # on CPUs only, where it has an order
}


def additions(tree: ast.AST) -> list[str]:
    """Calls that add by index."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {keyword.arg for keyword in node.keywords}
            name = node.func.attr
            puts = name in ("index_put", "index_put_", "put_") and ("accumulate" in keywords or len(node.args) > 2)
            scatters = name in ("scatter", "scatter_") and "reduce" in keywords
            if name in ADDS or puts or scatters:
                found.append(f"{ast.unparse(node.func.value)}.{name}")
    return found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("x.index_add_(0, i, y)", ["x.index_add_"]),
        ("torch.zeros(3).scatter_add(0, i, y)", ["torch.zeros(3).scatter_add"]),
        ("x.index_put_((i,), y, accumulate=True)", ["x.index_put_"]),
        ("x.scatter_(0, i, y, reduce='add')", ["x.scatter_"]),
        ("x.index_put_((i,), y); x.index_copy_(0, i, y); x.scatter_(0, i, y)", []),
    ],
)
def test_additions_are_found(line: str, found: list[str]) -> None:
    assert additions(ast.parse(line)) == found


def test_layers_add_no_floats_by_index() -> None:
    searched = [source for source in sources() if source.module.startswith(LAYERS)]
    assert len(searched) > 60
    found = {(source.module, call) for source in searched for call in additions(source.tree)}
    assert found == ALLOWED


def test_experts_are_summed_in_the_order_of_choices() -> None:
    """1e8 + 1 - 1e8 in float32 is 0 in this order and 1 in another."""
    outputs = {3: 1e8, 0: 1.0, 2: -1e8}
    experts = torch.tensor([[3, 0, 2], [3, 2, 0]])

    def run(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        values = [outputs.get(expert, 0.0) for expert, count in enumerate(counts.tolist()) for _ in range(count)]
        return torch.tensor(values).unsqueeze(1)

    found = run_by_expert(torch.zeros(2, 1), torch.ones(2, 3), experts, 4, run)
    assert found.flatten().tolist() == [0.0, 1.0]


def test_a_token_gets_the_same_bits_in_every_batch() -> None:
    x, weight = torch.randn(40, 64), torch.randn(6, 64, 64)
    weights, experts = softmax_top_k(torch.randn(40, 6), 3, renormalize=True)

    def run(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        pieces = x.split(counts.tolist())
        return torch.cat([(piece.unsqueeze(1) * weight[e, 0]).squeeze(1) for e, piece in enumerate(pieces)])

    whole = run_by_expert(x, weights, experts, 6, run)
    for first, last in ((0, 1), (3, 20), (39, 40)):
        rows = slice(first, last)
        assert torch.equal(run_by_expert(x[rows], weights[rows], experts[rows], 6, run), whole[rows])
