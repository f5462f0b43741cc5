"""Peak memory of loading, measured in processes of their own.

python -m pytest tests/weights/test_memory.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

NUM_LAYERS, SIZE = 8, 2048  # bfloat16: 16 MiB a layer in two tensors, 128 MiB in all

# Loads one rank's half (or whole) of tensors that are cut by rows and by columns; prints how many bytes the process's
# peak resident memory grew by.
CHILD = """
import sys
import torch
from max_ray.weights import NameMap, PartSpec, ShardedParameter, load_weights, open_weights

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

path, num_layers, size, tp_size = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
torch.ones(8, dtype=torch.bfloat16).add_(1)
before, source = peak(), open_weights(path)

def parameters():
    for layer in range(num_layers):
        for axis, name in enumerate(("up", "down")):
            spec = PartSpec((size, size), axis, size - size // tp_size, size, 0)
            yield f"{layer}.{name}", ShardedParameter(torch.empty(spec.local_shape, dtype=torch.bfloat16), {"": spec})

loaded = dict(parameters())
load_weights(loaded.items(), source, NameMap([("{}.up", "{}.up"), ("{}.down", "{}.down")]))
assert all((parameter.data == 1).all() for parameter in loaded.values())
print(peak() - before)
"""


def peak_growth(folder: Path, tp_size: int) -> int:
    arguments = [str(folder), str(NUM_LAYERS), str(SIZE), str(tp_size)]
    result = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_rank_of_two_peaks_at_half_and_loading_holds_one_tensor_more(tmp_path: Path) -> None:
    tensor = torch.ones(SIZE, SIZE, dtype=torch.bfloat16)
    names = [f"{layer}.{name}" for layer in range(NUM_LAYERS) for name in ("up", "down")]
    save_file({name: tensor.clone() for name in names}, tmp_path / "model.safetensors")
    whole, half = peak_growth(tmp_path, 1), peak_growth(tmp_path, 2)
    total = len(names) * tensor.nbytes
    assert total < whole < total + 3 * tensor.nbytes  # the shards, one tensor, and the interpreter's own growth
    assert half <= 0.6 * whole
