"""Compiling kernels for sm_90 on a machine without a GPU, and what the compiled code needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TARGET = GPUTarget("cuda", 90, 32)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Usage:
    """registers: a thread. stack: bytes a thread in local memory, where spilled registers go. shared: bytes a block."""

    registers: int
    stack: int
    shared: int
    uses_tensor_cores: bool


def compile_for_sm90(
    kernel: Any, arguments: dict[str, Any], num_warps: int = 4, num_stages: int = 3, **options: int
) -> Usage:
    """arguments, in order: a type such as "*bf16" or "i32", ":16" appended where a launch would see a multiple of 16
    (all pointers are), or the value of a constant."""
    types = {n: value for n, value in arguments.items() if _is_type(value)}
    signature = {name: types[name].removesuffix(":16") if name in types else "constexpr" for name in arguments}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(arguments)
        if name in types and (types[name].startswith("*") or types[name].endswith(":16"))
    }
    constants = {name: value for name, value in arguments.items() if name not in types}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(
        source, target=_TARGET, options={"num_warps": num_warps, "num_stages": num_stages, **options}
    )
    return _usage(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def _is_type(value: object) -> bool:
    return isinstance(value, str)


def _usage(cubin: bytes, ptx: str, shared: int) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], shared, "wgmma" in ptx or "mma.sync" in ptx)
