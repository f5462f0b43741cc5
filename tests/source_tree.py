"""The repository's own Python as syntax trees: which module imports what. For the tests of layering and style."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tests.code_lines import PACKAGES, ROOT, code_lines

__all__ = ["PACKAGES", "ROOT", "Import", "Source", "sources", "unit_of"]


@dataclass(frozen=True)
class Import:
    """One imported module. `late`: inside a function, so not at load time."""

    module: str
    line: int
    late: bool


@dataclass
class Source:
    """One file. `module` is its dotted name; a package's is that of the package."""

    path: Path
    module: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), str(self.path))

    @cached_property
    def code(self) -> set[int]:
        """Numbers of the lines that hold code; see code_lines."""
        return code_lines(self.path.read_text(encoding="utf-8"))

    @property
    def unit(self) -> str:
        """The part of the system that the import table speaks of: `max_ray.nn`, `architectures`, ..."""
        parts = self.module.split(".")
        return ".".join(parts[:2]) if parts[0] == "max_ray" else parts[0]

    @cached_property
    def imports(self) -> list[Import]:
        """Everything imported when the program runs; what stands under TYPE_CHECKING does not count."""
        return list(self._imports(self.tree, late=False))

    @cached_property
    def all_imports(self) -> list[Import]:
        """As `imports`, with what stands under TYPE_CHECKING."""
        return list(self._imports(self.tree, late=False, with_typing=True))

    def _imports(self, node: ast.AST, late: bool, with_typing: bool = False) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not with_typing:
                continue
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from (Import(name, child.lineno, late) for name in self._from(child))
            else:
                is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from self._imports(child, late or is_function, with_typing)

    def _from(self, node: ast.ImportFrom) -> Iterator[str]:
        """`from a import b` imports a.b where that is a module of ours, else a."""
        base = node.module or ""
        if node.level:
            package = self.module.split(".") if self.path.name == "__init__.py" else self.module.split(".")[:-1]
            parents = package[: len(package) - node.level + 1]
            base = ".".join([*parents, *([base] if base else [])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            yield full if _is_ours(full) else base


def _is_ours(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return module.split(".")[0] in PACKAGES and (path.with_suffix(".py").is_file() or path.is_dir())


def unit_of(module: str) -> str:
    """The unit of an imported module of ours."""
    return Source(Path(), module).unit


@cache
def sources() -> list[Source]:
    """Every Python file of the three packages."""
    found: list[Source] = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(Source(path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return found
