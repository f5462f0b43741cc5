"""What installs: the declared dependencies, the version, the types, and the wheel."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import max_ray
from tests.source_tree import PACKAGES, ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = {"gpu": {"triton"}, "otel": {"opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"}}
"""What only an extra brings, by its name."""
NAMESPACES = {  # what several distributions share
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.proto": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry": "opentelemetry-sdk",
}
PEERS = {"llama-cpp"}  # of slow tests that skip without it: it runs in an environment of its own
CLIENT_CALLS = ROOT / "tests" / "clients" / "calls"  # each runs in an environment of its own
NO_PART_OF_A_WHEEL = {"deployments/demo/train.py"}  # a script beside the model that it made
USER_PROGRAM = """\
from max_ray.interfaces import RequestID, TextGenerationRequest

request = TextGenerationRequest(RequestID(), prompt="Once upon a time")
print(request.prompt, request.{field})
"""
PIPELINE_PROGRAM = """\
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig

tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(PipelineConfig(model_path="folder"))
"""


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str]) -> set[str]:
    names = [re.match(r"[\w.-]+", requirement) for requirement in requirements]
    return {normalized(name[0]) for name in names if name is not None}


def imported(folders: Iterable[str]) -> set[str]:
    """Distributions that the code in these folders imports, wherever in a file and under whatever condition."""
    modules: set[str] = set()
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    for path in (path for path in paths if CLIENT_CALLS not in path.parents):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {top_of(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(top_of(node.module))
    of_module = packages_distributions() | {module: [name] for module, name in NAMESPACES.items()}
    foreign = modules - set(sys.stdlib_module_names) - {*PACKAGES, "tests"}
    return {normalized(of_module.get(module, [module])[0]) for module in foreign}


def top_of(module: str) -> str:
    """The module that a distribution brings: the first name, or the first two in a namespace package."""
    return next((name for name in NAMESPACES if f"{module}.".startswith(f"{name}.")), module.split(".")[0])


def test_the_packages_import_what_is_declared_and_declare_what_they_import() -> None:
    assert imported(PACKAGES) - set().union(*OPTIONAL.values()) == declared(PROJECT["dependencies"])
    for extra, names in OPTIONAL.items():
        assert declared(PROJECT["optional-dependencies"][extra]) >= names


def test_the_tests_import_what_is_declared() -> None:
    known = declared([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    assert imported(["tests"]) - known - PEERS == set()


def test_every_declared_dependency_is_pinned() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = declared(line for line in lines if not line.startswith("#"))
    assert declared([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]) - pinned == set()


def test_the_version_is_said_once() -> None:
    assert "version" not in PROJECT
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", max_ray.__version__)


def run_mypy(program: str, folder: Path, site: Path) -> str:
    """What mypy says of a user's program, `site` being where the packages are installed."""
    path = folder / "program.py"
    path.write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


@pytest.mark.timeout(600)
def test_a_users_program_is_checked_against_our_types(tmp_path: Path) -> None:
    """Installed packages count for mypy only with py.typed."""
    site = tmp_path / "site"
    site.mkdir()
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file()
        (site / package).symlink_to(ROOT / package)
    assert "Success" in run_mypy(USER_PROGRAM.format(field="request_id"), tmp_path, site)
    wrong = run_mypy(USER_PROGRAM.format(field="request_name"), tmp_path, site)
    assert '"TextGenerationRequest" has no attribute "request_name"' in wrong


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents and its command, made without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith(f"max_ray-{max_ray.__version__}-")
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    return site


def run_installed(site: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run(
        command, cwd=site.parent, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_packages(installed: Path) -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            relative = path.relative_to(ROOT)
            if path.is_dir() or path.suffix in (".md", ".pyc") or str(relative) in NO_PART_OF_A_WHEEL:
                continue
            assert (installed / relative).is_file(), relative


@pytest.mark.slow
def test_the_wheel_imports_and_runs(installed: Path) -> None:
    where = "import max_ray, max_ray.pipelines, deployments; print(max_ray.__file__)"
    assert run_installed(installed, sys.executable, "-c", where).startswith(str(installed))
    max_ray_command = str(installed / "bin" / "max-ray")
    assert "serve a model over HTTP" in run_installed(installed, max_ray_command, "--help")
    assert run_installed(installed, max_ray_command, "version").strip() == max_ray.__version__
    assert "LlamaForCausalLM" in run_installed(installed, max_ray_command, "list")


@pytest.mark.slow
def test_the_wheel_generates_with_the_demo_model(installed: Path) -> None:
    model = installed / "deployments" / "demo" / "shakespeare"
    command = [str(installed / "bin" / "max-ray"), "generate", "--model-path", str(model), "--prompt", "To be"]
    assert len(run_installed(installed, *command, "--max-new-tokens", "8", "--devices", "cpu")) > 8


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("program", [USER_PROGRAM.format(field="request_id"), PIPELINE_PROGRAM])
def test_a_users_program_is_checked_against_the_wheel(installed: Path, tmp_path: Path, program: str) -> None:
    assert "Success" in run_mypy(program, tmp_path, installed)
