"""The NCCL of torch: what is required, what is installed, what is loaded."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml

from max_ray.distributed.nccl import nccl_problem, required_nccl

ROOT = Path(__file__).parents[2]
CU13 = ("nvidia-nccl-cu13", "2.28.9")


def test_the_requirement_of_torch() -> None:
    wheel = ["filelock", 'nvidia-nccl-cu13==2.28.9; platform_system == "Linux"', "triton==3.6.0"]
    assert required_nccl(wheel) == CU13
    assert required_nccl(["filelock"]) is None


@pytest.mark.parametrize(
    ("cuda", "required", "installed", "loaded", "said"),
    [
        ("13.0", CU13, {"nvidia-nccl-cu13": "2.28.9"}, "2.28.9", None),
        ("13.0", CU13, {CU13[0]: "2.28.9", "nvidia-nccl-cu12": "2.27"}, "2.28.9", "uninstall nvidia-nccl-cu12"),
        ("13.0", CU13, {"nvidia-nccl-cu13": "2.28.9"}, "2.27.3", "built for 2.28.9"),
        ("12.8", None, {"nvidia-nccl-cu12": "2.27"}, "2.27.0", None),
        ("12.8", None, {}, "2.27.0", None),
        ("12.8", None, {"nvidia-nccl-cu13": "2.28.9"}, "2.28.9", "uninstall nvidia-nccl-cu13"),
    ],
)  # fmt: skip
def test_problems(
    cuda: str, required: tuple[str, str] | None, installed: dict[str, str], loaded: str, said: str | None
) -> None:
    problem = nccl_problem(cuda, required, installed, loaded)
    assert (problem is None) if said is None else (problem is not None and said in problem)


def test_no_recipe_installs_the_nccl_of_cuda_12() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not [package for package in extras["gpu"] if "nccl" in package]
    assert extras["cu12"] == ["nvidia-nccl-cu12"]
    commands = yaml.safe_load((ROOT / "cluster.yaml").read_text())["setup_commands"]
    assert not [command for command in commands if "cu12" in command]
