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

# For tensor-parallel 1 and 2: loads the last rank's part of tensors that are cut by rows and by columns, in a fork of
# its own, which prints by how many bytes its peak resident memory grew. One line each.
CHILD = """
import os
import sys
import torch
from max_ray.weights import NameMap, PartSpec, ShardedParameter, load_weights, open_weights

path, num_layers, size = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
torch.ones(8, dtype=torch.bfloat16).add_(1)

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def parameters(tp_size):
    for layer in range(num_layers):
        for axis, name in enumerate(("up", "down")):
            spec = PartSpec((size, size), axis, size - size // tp_size, size, 0)
            yield f"{layer}.{name}", ShardedParameter(torch.empty(spec.local_shape, dtype=torch.bfloat16), {"": spec})

for tp_size in (1, 2):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    before, source = peak(), open_weights(path)
    loaded = dict(parameters(tp_size))
    load_weights(loaded.items(), source, NameMap([("{}.up", "{}.up"), ("{}.down", "{}.down")]))
    print(peak() - before, flush=True)
    assert all(parameter.data.min() == parameter.data.max() == 1 for parameter in loaded.values())
    os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_rank_of_two_peaks_at_half_and_loading_holds_one_tensor_more(tmp_path: Path) -> None:
    tensor = torch.ones(SIZE, SIZE, dtype=torch.bfloat16)
    names = [f"{layer}.{name}" for layer in range(NUM_LAYERS) for name in ("up", "down")]
    save_file({name: tensor.clone() for name in names}, tmp_path / "model.safetensors")
    arguments = [str(tmp_path), str(NUM_LAYERS), str(SIZE)]
    result = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    whole, half = map(int, result.stdout.split())
    total = len(names) * tensor.nbytes
    assert (
        total < whole < total + 4 * tensor.nbytes
    )  # the shards, one tensor, and pages of libraries that a fork maps anew
    assert half <= 0.6 * whole
