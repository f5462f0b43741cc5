"""The documentation builds without a network and without a warning, and it covers the public API."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT

DOCS = ROOT / "docs"


def find_module(name: str) -> bool:
    """Whether an entry is a module; else it is a function whose name a module has, too."""
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


ENTRIES = re.findall(
    r"^::: (\S+)", "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))), re.MULTILINE
)
MODULES = [name for name in ENTRIES if find_module(name)]
OFFLINE = """
import runpy, socket, sys
def refuse(*arguments, **options):
    raise OSError("the documentation asked for the network")
socket.create_connection = socket.getaddrinfo = refuse
sys.argv = ["mkdocs", *sys.argv[1:]]
runpy.run_module("mkdocs", run_name="__main__")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.mark.slow
def test_every_public_name_has_an_entry(site: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    anchors = set(re.findall(r'id="([^"]+)"', pages))
    missing = [
        f"{module}.{name}"
        for module in MODULES
        for name in getattr(importlib.import_module(module), "__all__", ())
        if not {f"{module}.{name}", f"{module}.{name}.{name}"} & anchors  # a module of the name hides a function's
    ]
    assert missing == []


@pytest.mark.slow
def test_pages_load_nothing_from_outside(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//([^"]*)"', text)
        loaded += re.findall(r'<link[^>]*href="(?:https?:)?//([^"]*)"', text)
        assert loaded == [], page


def test_modules_with_public_names_are_documented() -> None:
    """Of the library: what a user imports. Rooms that are internal are named here."""
    internal = {
        *("max_ray.engine.sampling.sampler", "max_ray.pipelines.builder", "max_ray.registry"),
        *("max_ray.kernels.reference", "max_ray.kernels.gpu", "max_ray.kernels.native", "max_ray.nn.legacy.kv_cache"),
        "max_ray.tokenization.loading",
    }
    public = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "max_ray").rglob("*.py")
        if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert public - internal <= set(MODULES)
    assert internal <= public


def test_moved_files_exist() -> None:
    """The right column of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    moved = re.findall(r"^\| `[^`]+` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert len(moved) > 50
    assert [path for path in moved if not (ROOT / path).exists()] == []
