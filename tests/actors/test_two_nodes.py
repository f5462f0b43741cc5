"""A replica whose workers are on another node: runs, extensions and cache updates go over TCP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.actors.two_nodes import PORTS

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_replica_reaches_its_workers_on_another_node(tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "tests.actors.two_nodes", str(tiny_llama)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["replica"] not in found["workers"]
    assert len(set(found["workers"])) == 1
    assert set(found["peers"]) == {"127.0.0.3"}, "never by a Unix socket"
    assert found["ports"] == [list(PORTS)] * len(found["ports"])
    assert found["tokens"] == found["extended"] == found["after_rebuild"] == found["expected"]
    assert len(found["expected"]) == 12
    assert found["blocks"] == 2
