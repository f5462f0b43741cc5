"""The C++ kernels as other processors get them: compiled without this one's instructions, held against the same tests.

python -m pytest -m slow tests/kernels/test_older_processors.py
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from max_ray.kernels import native

HERE = Path(__file__).parent
FILES = [
    "test_native.py",
    "test_native_latent.py",
    "test_quantized.py",
    "test_sinks.py",
    "test_paged_attention.py",
    "test_tape.py",
    "../weights/test_gguf.py",
]
MAIN = """
import sys
import pytest
from max_ray.kernels.native import build
build._FLAGS = tuple(sys.argv[1] if flag == "-march=native" else flag for flag in build._FLAGS)
loaded = build.library()
assert loaded is not None, "it was not built"
print("bfloat16:", loaded.has_bf16_products(), "bytes:", loaded.has_int8_products(), end=" ")
print("tiles:", loaded.has_matrix_registers())
import time
import torch
from max_ray import kernels
torch.set_num_threads(1)
x, weight = torch.randn(256, 1024), torch.randn(1024, 1024)
packed = kernels.pack_weight(weight)
def seconds(run):
    def once():
        started = time.thread_time()
        run()
        return time.thread_time() - started
    return min(once() for _ in range(9))
ratio = seconds(lambda: packed.linear(x, None)) / seconds(lambda: torch.nn.functional.linear(x, weight))
print("float32, 256 rows: CPU time of torch's product times %.2f" % ratio)
assert ratio < 4, ratio  # torch's own may use this processor's instructions; with sums in memory it was 28
sys.exit(pytest.main(["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


# flags, the instruction sets that a processor must have to run them, and what the kernels may use
OLDER = [
    ("-march=x86-64-v3", (), "bfloat16: 0 bytes: 0 tiles: 0"),
    ("-march=skylake-avx512", ("avx512bw",), "bfloat16: 0 bytes: 0 tiles: 0"),
    ("-march=cooperlake", ("avx512bw", "avx512_vnni", "avx512_bf16"), "bfloat16: 1 bytes: 1 tiles: 0"),
]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are x86's")
@pytest.mark.parametrize(("flag", "needed", "used"), OLDER, ids=[flag for flag, *_ in OLDER])
def test_without_later_instructions(flag: str, needed: tuple[str, ...], used: str, tmp_path: Path) -> None:
    features = Path("/proc/cpuinfo").read_text().split()
    missing = [name for name in needed if name not in features]
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    command = [sys.executable, "-c", MAIN, flag, *(str(HERE / name) for name in FILES)]
    environment = os.environ | {"MAX_RAY_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-5_000:]
    assert used in result.stdout
    print(flag, *(line for line in result.stdout.splitlines() if "tiles:" in line or "256 rows" in line))
