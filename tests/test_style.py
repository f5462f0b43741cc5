"""Style that a machine can check: a header in every module, small files, small functions, shallow nesting."""

from __future__ import annotations

import ast

import pytest

from tests.code_lines import code_lines
from tests.source_tree import ROOT, Source, sources

MAX_FILE_LINES = 400  # of code: see code_lines
SCRIPTS = {"deployments.demo.train"}  # copied and run by themselves, so not held to the sizes
MAX_FUNCTION_LINES = 60
SMALL_FUNCTION_LINES = 20
MIN_SHARE_OF_SMALL_FUNCTIONS = 0.94
MAX_NESTING = 4  # a function's own body is level 0; rule: 3, with room for one `try` or `with`

_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def functions(source: Source) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(source.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def depth(node: ast.AST) -> int:
    """Deepest nesting of blocks below `node`; `elif` and `else` do not nest."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child) + (isinstance(child, _BLOCKS) and not is_elif))
    return deepest


def size(function: ast.FunctionDef | ast.AsyncFunctionDef, code: set[int]) -> int:
    """Code lines of a function, from its `def` to its end."""
    return sum(line in code for line in range(function.lineno, (function.end_lineno or 0) + 1))


def test_code_is_what_is_no_blank_no_comment_and_no_docstring() -> None:
    text = '''"""Header,

two lines."""

import a  # a note

# a comment
X = """a string

of three lines"""
"""A note below an assignment is no docstring."""


class C:
    """One."""

    def f(self) -> int:
        """Two
        lines."""
        # why
        return (
            1

        )
'''
    code = code_lines(text)
    assert sorted(code) == [5, 8, 9, 10, 11, 14, 17, 21, 22, 24]
    (function,) = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert size(function, code) == 4


def test_most_functions_are_small() -> None:
    sizes = [
        size(function, source.code)
        for source in sources()
        if source.module not in SCRIPTS
        for function in functions(source)
    ]
    small = sum(lines <= SMALL_FUNCTION_LINES for lines in sizes) / len(sizes)
    print(f"{len(sizes)} functions, {small:.1%} of at most {SMALL_FUNCTION_LINES} code lines, longest {max(sizes)}")
    assert small >= MIN_SHARE_OF_SMALL_FUNCTIONS


def test_depth_counts_blocks() -> None:
    tree = ast.parse("if a:\n  for b in c:\n    pass\nelif d:\n  pass\nelif e:\n  with f:\n    pass")
    assert depth(tree) == 2


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.module)
def test_module(source: Source) -> None:
    assert ast.get_docstring(source.tree), "a module begins with a header docstring"
    text = source.path.read_text(encoding="utf-8")
    assert "TODO" not in text
    if source.module in SCRIPTS:
        return
    assert len(source.code) <= MAX_FILE_LINES
    for function in functions(source):
        lines = size(function, source.code)
        assert lines <= MAX_FUNCTION_LINES, f"{function.name} has {lines} lines"
        assert depth(function) <= MAX_NESTING, f"{function.name} is nested {depth(function)} deep"


def test_no_file_has_a_name_that_says_nothing() -> None:
    names = {
        path.stem for package in ("max_ray", "architectures", "deployments") for path in (ROOT / package).rglob("*.py")
    }
    assert not names & {"utils", "util", "helpers", "misc", "common"}
