"""The scheduler's classes stay small: one task each."""

from __future__ import annotations

import ast

import pytest

from tests.source_tree import sources

MAX_METHODS = 15
CLASSES = [
    (f"{source.module}.{node.name}", node)
    for source in sources()
    if source.module.startswith("max_ray.scheduler")
    for node in ast.walk(source.tree)
    if isinstance(node, ast.ClassDef)
]


@pytest.mark.parametrize("node", [pytest.param(node, id=name) for name, node in CLASSES])
def test_number_of_methods(node: ast.ClassDef) -> None:
    methods = [child.name for child in node.body if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert len(methods) <= MAX_METHODS, methods
