# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel for GPUs that are absent and read the machine code.

    python -m fastcache.triton_kernels.aot [--quick] [--only NAME] [--amd]

The launchers themselves are called, on meta tensors of model size, while a stand-in for Triton's
driver names the target: what is compiled is what a GPU would run, down to types, alignment, block
sizes and options. The gate fails on an error, any spill or stack, more than 128 registers, a float
added atomically, any atomic but the count of arrived programs, fewer 16-byte accesses than the
tensors need, and a fused multiply-add where results must equal the eager chain. Nothing is run.

Known: for sm_100, triton 3.6 fuses although it is told not to (FFMA2, in `_combine_kernel` as in
`_quantized_combine_kernel`). The gate then refuses; 3.7 does as it is told. For sm_90, 3.8 spills 2
registers of "guidance" in fp32, and 3.9 spills 4 of "guided sums 1" in bf16; 3.7 spills none.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import (
    combine_samples,
    exponential_solve,
    guidance_combine,
    guided_check,
    guided_solve,
    guided_sums,
    linear_combine,
    modulated_l1,
    quantize_store,
    quantized_combine,
    residual_apply,
    residual_l1,
    residual_magnitude,
    residual_store,
    taylor_update,
)
from .machine_code import Code, code_of, wide_accesses

ARCHS = (80, 90, 100)


AMD = "gfx942"


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


MAX_REGISTERS = 128


# Kernels that read only single numbers.
SCALAR = ("_guided_solve_kernel", "_guided_check_kernel", "_exponential_kernel")


# Kernels whose programs count themselves when they have written their partial sums.
COUNTING = (
    "_residual_l1_kernel",
    "_residual_magnitude_kernel",
    "_modulated_l1_kernel",
    "_guided_sums_kernel",
)


# Kernels whose float32 results equal a chain of separate products and sums.
UNFUSED = ("_combine_kernel", "_quantized_combine_kernel")


@dataclass(frozen=True)
class Report:
    """One kernel, compiled for one target: its code, the 16-byte accesses it needs, or an error."""

    case: str
    kernel: str
    arch: int | str
    dtype: str
    code: Code = field(default_factory=Code)
    loads: int = 0
    stores: int = 0
    error: str = ""

    def faults(self) -> list[str]:
        """Why the gate refuses this kernel; empty where it passes."""
        if self.error:
            return [self.error]
        code = self.code
        found = {
            f"{code.spills} spills": code.spills > 0,
            f"{code.stack} bytes of stack": code.stack > 0,
            f"{code.registers} registers, {MAX_REGISTERS} allowed": code.registers > MAX_REGISTERS,
            f"{code.atomics} atomics on floats": code.atomics > 0,
            f"{code.counts} atomic counts": code.counts != (self.kernel in COUNTING),
            "a count without a fence": code.counts > code.fences,
            f"{code.loads} of {self.loads} 16-byte loads": code.loads < self.loads,
            f"{code.stores} of {self.stores} 16-byte stores": code.stores < self.stores,
            f"{code.fused} fused multiply-adds": code.fused > 0 and self.kernel in UNFUSED,
        }
        return [text for text, bad in found.items() if bad]


def cases(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Calls of the launchers by name: every kernel, and every variant that changes its code."""

    def t(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape or (4608, 3072), dtype=dtype, device="meta")

    fp32 = partial(t, dtype=torch.float32)
    tokens = t(2, 4608, 3072)[:, 512:]
    # 16 does not divide the number of elements: full blocks must be as wide, the tail is masked
    odd = t(4607, 3075)
    q, scale = t(dtype=torch.float8_e4m3fn), fp32(4608)
    cond, part, pair = t(2, 1024, 64), fp32(2, 1024, 64), t(4, 1024, 64)
    half = 0.5
    states, row = partial(t, 1, 4608, 3072), t(1, 1, 3072)
    wide, widest = t(1, 32760, 5120), t(1, 4608, 12288)
    first, second, third = (t(1, sums, dtype=torch.float64) for sums in (3, 6, 10))
    return {
        "l1": partial(residual_l1, t(), t(), t()),
        "l1 + store": partial(residual_l1, t(), t(), t(), t()),
        "l1 + store ragged": partial(residual_l1, odd, odd, odd, odd),
        "l1 token range": partial(residual_l1, tokens, tokens, tokens),
        "magnitude + store": partial(residual_magnitude, t(), t(), t(), t()),
        "modulated": partial(modulated_l1, states(), row, row, states()),
        "modulated + store": partial(modulated_l1, states(), row, row, states(), states()),
        "modulated + store fp32 rows": partial(
            modulated_l1, states(), fp32(1, 1, 3072), fp32(1, 1, 3072), states(), states()
        ),
        "modulated + store per token": partial(
            modulated_l1, states(), states(), states(), states(), states()
        ),
        "modulated + store wide": partial(modulated_l1, wide, wide[:, :1], wide[:, :1], wide, wide),
        "modulated + store widest": partial(
            modulated_l1, widest, widest[:, :1], widest[:, :1], widest, widest
        ),
        "store": partial(residual_store, t(), t(), t()),
        "store ragged": partial(residual_store, odd, odd, odd),
        "apply token range": partial(residual_apply, tokens, tokens, tokens),
        "combine 3": partial(linear_combine, t(), [t()] * 3, [half] * 3),
        "combine 3 ragged": partial(linear_combine, odd, [odd] * 3, [half] * 3),
        "combine 3 device": partial(linear_combine, t(), [t()] * 3, fp32(3)),
        "combine 3 samples": partial(combine_samples, tokens, [tokens] * 3, fp32(2, 3)),
        "combine 5": partial(linear_combine, t(), [t()] * 5, [half] * 5),
        "combine 8": partial(linear_combine, t(), [t()] * 8, [half] * 8),
        "guidance": partial(guidance_combine, pair, cond, part, part, half, half),
        "taylor 2": partial(taylor_update, [t()] * 3, t(), half, 3),
        "taylor 2 ragged": partial(taylor_update, [odd] * 3, odd, half, 3),
        "taylor 4": partial(taylor_update, [t()] * 5, t(), half, 5),
        "quantize": partial(quantize_store, q, scale, t(), t()),
        "quantized combine 3": partial(
            quantized_combine, t(), t(), [q] * 3, [scale] * 3, [half] * 3
        ),
        "quantized combine 2 device": partial(
            quantized_combine, t(), None, [q] * 2, [scale] * 2, fp32(2)
        ),
        "guided sums 1": partial(guided_sums, t(), [t()] * 2),
        "guided sums 2": partial(guided_sums, t(), [t()] * 3),
        "guided sums 3": partial(guided_sums, t(), [t()] * 4),
        "guided solve 1": partial(guided_solve, first, fp32(1), half),
        "guided solve 2": partial(guided_solve, second, fp32(2), half),
        "guided solve 3": partial(guided_solve, third, fp32(3), half),
        "guided check 2": partial(guided_check, second, [first], fp32(2), fp32(1), half),
        "guided check 3": partial(guided_check, third, [second] * 2, fp32(3), fp32(2), half),
        "exponential 4": partial(exponential_solve, [second], fp32(1), half),
        "exponential 8": partial(exponential_solve, [second] * 5, fp32(1), half),
    }


class _AbsentGPU:
    """What Triton asks its driver before it compiles; there is nothing to launch on."""

    def __init__(self, arch: int | str):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.arch, int):
            return GPUTarget("cuda", self.arch, 32)
        return GPUTarget("hip", self.arch, 64)

    def get_current_device(self) -> int | str:
        return self.arch

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compile_only(arch: int | str) -> Iterator[list[tuple[str, triton.compiler.CompiledKernel]]]:
    """Inside, launches compile for `arch` and are listed as (kernel name, binary), not run."""
    compiled = []
    run = triton.JITFunction.run

    def compile_instead(self, *args, warmup, **kwargs):
        compiled.append((self.__name__, run(self, *args, warmup=True, **kwargs)))

    driver.set_active(_AbsentGPU(arch))
    triton.JITFunction.run = compile_instead
    try:
        yield compiled
    finally:
        triton.JITFunction.run = run
        driver._active = None


def _reason(error: BaseException) -> str:
    """The last line of the innermost error: Triton's start with a listing."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def inspect(case: str, arch: int | str, dtype: str) -> list[Report]:
    """One report per kernel that the case launches on `arch` with tensors of `dtype`."""
    call = cases(DTYPES[dtype])[case]
    reports = []
    with compile_only(arch) as compiled:
        try:
            call()
        except Exception as error:  # a compiler error of any kind is the finding
            return [Report(case, "?", arch, dtype, error=_reason(error))]
    for name, kernel in compiled:
        report = Report(case, name, arch, dtype, code_of(kernel))
        if name not in SCALAR and arch != AMD:
            threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
            loads, stores = (
                wide_accesses(kernel.asm["ttgir"], op, threads) for op in ("load", "store")
            )
            report = replace(report, loads=loads, stores=stores)
        reports.append(report)
    return reports


def check(
    archs: Sequence[int | str] = ARCHS,
    dtypes: Sequence[str] = ("bf16", "fp32"),
    only: str = "",
    workers: int | None = None,
) -> list[Report]:
    """Reports of all cases whose name contains `only`, in fixed order."""
    names = [name for name in cases(torch.float32) if only in name]
    jobs = list(product(names, archs, dtypes))
    workers = min(len(jobs), workers or os.cpu_count() or 1)
    if workers <= 1:
        found = [inspect(*job) for job in jobs]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            found = list(pool.map(inspect, *zip(*jobs, strict=True), chunksize=4))
    return [report for reports in found for report in reports]


def table(reports: Sequence[Report]) -> str:
    """One line per kernel variant."""
    head = f"{'case':27} {'kernel':27} {'arch':>6} {'dtype':5} {'regs':>4} {'spills':>6}"
    lines = [f"{head} {'loads':>7} {'stores':>7}  faults"]
    for r in reports:
        loads, stores = f"{r.code.loads}/{r.loads}", f"{r.code.stores}/{r.stores}"
        arch = f"sm_{r.arch}" if isinstance(r.arch, int) else r.arch
        lines.append(
            f"{r.case:27} {r.kernel:27} {arch:>6} {r.dtype:5} {r.code.registers:4} "
            f"{r.code.spills:6} {loads:>7} {stores:>7}  {'; '.join(r.faults()) or '-'}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastcache.triton_kernels.aot", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="sm_90 only")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--amd", action="store_true", help=f"{AMD} as well, without access widths")
    parser.add_argument("--workers", type=int, help="processes, default one per core")
    options = parser.parse_args(arguments)
    archs = [*((90,) if options.quick else ARCHS), *([AMD] if options.amd else [])]
    start = time.perf_counter()
    reports = check(archs, options.dtypes, options.only, options.workers)
    failed = [report for report in reports if report.faults()]
    print(table(reports))
    print(
        f"{len(reports)} kernels, {len(failed)} refused, {time.perf_counter() - start:.0f} s; "
        f"triton {triton.__version__}; loads and stores are 16-byte accesses found / needed; "
        "nothing was run"
    )
    return 1 if failed or not reports else 0


if __name__ == "__main__":
    raise SystemExit(main())
