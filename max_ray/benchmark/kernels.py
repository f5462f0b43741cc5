"""`max-ray benchmark kernels`: each kernel against its reference and against the machine's ceilings.

Needs torch (and, on a GPU, triton), neither Ray nor pydantic, and no checkpoint:

    python -m max_ray.benchmark.kernels

Columns: error against the reference in float32; time of a call; GB/s of the bytes that the work must move and their
share of the machine's copy rate; TFLOP/s and their share of its matmul peak; `floor`: the least time that the two
ceilings allow over the time taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from max_ray import kernels
from max_ray.benchmark.aligned import line, write_results
from max_ray.benchmark.case_log import CaseLog
from max_ray.benchmark.device_flags import add_kernel_flags, check_positive, numbers
from max_ray.benchmark.kernel_cases import CaseMaker, Sizes, all_cases
from max_ray.benchmark.quantized_cases import quantized_cases
from max_ray.benchmark.shapes import load_shape
from max_ray.benchmark.timing import Machine, choose_device, choose_dtype, seconds, synchronize
from max_ray.errors import MaxRayError

_HEAD = ("kernel", "error", "us", "GB/s", "of copy", "TFLOP/s", "of peak", "floor")
_QUANTIZED_ROWS = (1, 16, 64)  # of layers with a quantized weight, beside a prefill step
_WIDTHS = (46, 11, 11, 9, 9, 9, 9, 8)


def run(options: dict[str, Any]) -> None:
    """Prints the table as it is measured. Raises ConfigError, and MaxRayError at the end where a kernel is wrong or
    failed; the other kernels are measured all the same."""
    device, dtype = choose_device(options["device"]), choose_dtype(options["dtype"])
    on_gpu = device.type == "cuda"
    tokens = options["tokens"] or (8192 if on_gpu else 64)
    context = options["context"] or (8192 if on_gpu else 128)
    check_positive(tokens=tokens, context=context)
    rows = numbers(options["rows"] or ("1,64,256" if on_gpu else "1,4"))
    shape = options["shape"] or ("llama-8b" if on_gpu else "tiny")
    sizes = Sizes.of(load_shape(shape), tokens, context, rows)
    with torch.inference_mode():
        machine = Machine.measure(device, dtype)
        print("\n".join([f"kernels, {shape}, {options['dtype']}", *machine.lines(), line(_HEAD, _WIDTHS)]), flush=True)
        report = {"benchmark": "kernels", "shape": shape, "dtype": options["dtype"], "machine": machine.as_json()}
        log = CaseLog.from_environment("kernels", partial(synchronize, device))
        measure_cases(_cases(sizes, device, dtype), machine, device, log, options["json"], report)
    log.finish()
    if log.failed:
        raise MaxRayError(f"These kernels failed or do not agree with their references: {', '.join(log.failed)}.")


def measure_cases(
    cases: Iterable[tuple[str, CaseMaker]],
    machine: Machine,
    device: torch.device,
    log: CaseLog,
    path: str | None = None,
    report: dict[str, Any] | None = None,
) -> None:
    """Measures cases one after the other. path: of a file that has `report` and the results after each case."""
    results = []
    for name, make in cases:
        result = log.run(name, partial(_measure, name, make, machine, device))
        if result is not None:
            results.append(result)
        write_results(path, (report or {}) | {"kernels": results})


def _cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, CaseMaker]]:
    yield from all_cases(sizes, device, dtype)
    tokens, rows = sorted({*_QUANTIZED_ROWS, sizes.tokens}), 2 * sizes.inner
    if kernels.is_interpreted():  # each is seconds in the interpreter
        tokens, rows = [sizes.tokens, _QUANTIZED_ROWS[-1]], 32
    yield from quantized_cases(rows, sizes.hidden, tokens, device, dtype)


def _measure(name: str, make: CaseMaker, machine: Machine, device: torch.device) -> dict[str, Any]:
    case = make()
    error = case.error(case.run(), case.reference())
    time_s = seconds(case.calls, device)
    byte_rate, flop_rate = case.nbytes / time_s, case.flops / time_s
    result = {
        "kernel": name,
        "error": min(error, 1e30),
        "agrees": error <= case.tolerance,
        "seconds": time_s,
        "bytes": case.nbytes,
        "flops": case.flops,
        "share_of_copy": byte_rate / machine.copy_bytes_per_s,
        "share_of_matmul": flop_rate / machine.matmul_flops_per_s,
        "share_of_floor": machine.floor_s(case.nbytes, case.flops) / time_s,
    }
    cells = [name, f"{error:.1e}" if result["agrees"] else f"WRONG {error:.0e}", f"{time_s * 1e6:.1f}"]
    cells += [f"{byte_rate / 1e9:.1f}", f"{result['share_of_copy']:.1%}"]
    cells += [f"{flop_rate / 1e12:.3f}", f"{result['share_of_matmul']:.1%}", f"{result['share_of_floor']:.1%}"]
    print(line(cells, _WIDTHS), flush=True)
    return result


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 after a mistake of the user or a kernel that is wrong."""
    parser = argparse.ArgumentParser(prog="python -m max_ray.benchmark.kernels", allow_abbrev=False)
    add_kernel_flags(parser)
    try:
        run(vars(parser.parse_args(arguments)))
    except MaxRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
