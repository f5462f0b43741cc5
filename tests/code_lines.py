"""Counts lines of code: those that are neither blank, nor a comment, nor part of a docstring.

python -m tests.code_lines [FOLDER]        # the sum for each package, and for all
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("max_ray", "architectures", "deployments")
ROOT = Path(__file__).parents[1]
_NO_CODE = frozenset(
    {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
        *(tokenize.ENCODING, tokenize.ENDMARKER),
    }
)


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code.

    A line counts when a token other than a comment is on it. All lines of a string count, unless it is a docstring.

    Args:
        text: A module's source.

    Raises:
        SyntaxError: The text is not Python.
    """
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - set(_docstring_lines(ast.parse(text)))


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            yield from range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1)


def count(folder: Path) -> int:
    """Code lines of all Python files below `folder`."""
    return sum(len(code_lines(path.read_text(encoding="utf-8"))) for path in folder.rglob("*.py"))


def main() -> None:
    """Prints the sums for the packages in the given folder, by default this repository."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    counts = {package: count(root / package) for package in PACKAGES}
    for package, number in counts.items():
        print(f"{package:14} {number:6}")
    print(f"{'all':14} {sum(counts.values()):6}")


if __name__ == "__main__":
    main()
