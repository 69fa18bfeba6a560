"""Compile every kernel for GPUs that are absent and read the machine code.

    python -m fastcache.triton_kernels.aot [--quick] [--only NAME] [--amd]

The launchers themselves are called, on meta tensors of model size, while a stand-in for Triton's
driver names the target: what is compiled is what a GPU would run, down to types, alignment, block
sizes and options. The gate fails on an error, any spill or stack, more than 128 registers, an
atomic, fewer 16-byte accesses than the tensors need, and a fused multiply-add where results must
equal the eager chain. Nothing is run.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastcache import triton_kernels as kernels

ARCHS = (80, 90, 100)
AMD = "gfx942"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
MAX_REGISTERS = 128
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Kernels that read only partial sums or single numbers.
SCALAR = ("_sum_partials_kernel", "_guided_solve_kernel")
# Kernels whose float32 results equal a chain of separate products and sums.
UNFUSED = ("_combine_kernel", "_quantized_combine_kernel")

Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel, compiled for one target, contains."""

    case: str
    kernel: str
    arch: int | str
    dtype: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    loads: tuple[int, int] = (0, 0)  # wide, needed
    stores: tuple[int, int] = (0, 0)  # wide, needed
    atomics: int = 0
    fused: int = 0
    error: str = ""

    def faults(self) -> list[str]:
        """Why the gate refuses this kernel; empty where it passes."""
        if self.error:
            return [self.error]
        found = {
            f"{self.spills} spills": self.spills,
            f"{self.stack} bytes of stack": self.stack,
            f"{self.registers} registers, {MAX_REGISTERS} allowed": self.registers > MAX_REGISTERS,
            f"{self.atomics} atomics": self.atomics,
            "{} of {} 16-byte loads".format(*self.loads): self.loads[0] < self.loads[1],
            "{} of {} 16-byte stores".format(*self.stores): self.stores[0] < self.stores[1],
            f"{self.fused} fused multiply-adds": self.fused and self.kernel in UNFUSED,
        }
        return [text for text, bad in found.items() if bad]


# --- what is compiled: each launcher, on tensors of model size -----------------------------------


def _ragged(t: Make) -> Iterator[tuple[str, Callable[[], object]]]:
    """Element counts that 16 does not divide: full blocks must be as wide, the tail is masked."""
    odd = (4607, 3075)
    yield "store", lambda: kernels.residual_store(t(odd), t(odd), t(odd))
    yield "combine 3", lambda: kernels.linear_combine(t(odd), [t(odd)] * 3, [0.5] * 3)
    yield "l1 + store", lambda: kernels.residual_l1(t(odd), t(odd), t(odd), t(odd))
    yield "taylor 2", lambda: kernels.taylor_update([t(odd)] * 3, t(odd), 0.5, 3)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call of a launcher) for every kernel and every variant that changes its code."""

    def t(shape: Sequence[int] = (4608, 3072), dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def tokens() -> Tensor:
        return t((2, 4608, 3072))[:, 512:]

    def fp32(*shape: int) -> Tensor:
        return t(shape, torch.float32)

    def e4m3() -> Tensor:
        return t(dtype=torch.float8_e4m3fn)

    def guidance() -> None:
        parts = fp32(2, 1024, 64), fp32(2, 1024, 64)
        kernels.guidance_combine(t((4, 1024, 64)), t((2, 1024, 64)), *parts, 0.5, 0.5)

    yield "l1", lambda: kernels.residual_l1(t(), t(), t())
    yield "l1 + store", lambda: kernels.residual_l1(t(), t(), t(), t())
    yield "l1 token range", lambda: kernels.residual_l1(tokens(), tokens(), tokens())
    yield "magnitude + store", lambda: kernels.residual_magnitude(t(), t(), t(), t())
    yield "store", lambda: kernels.residual_store(t(), t(), t())
    yield "apply token range", lambda: kernels.residual_apply(tokens(), tokens(), tokens())
    for n in (3, 5, 8):
        yield f"combine {n}", lambda n=n: kernels.linear_combine(t(), [t()] * n, [0.5] * n)
    yield "combine 3 device", lambda: kernels.linear_combine(t(), [t()] * 3, fp32(3))
    yield "guidance", guidance
    for k in (2, 4):
        yield f"taylor {k}", lambda k=k: kernels.taylor_update([t()] * (k + 1), t(), 0.5, k + 1)
    yield "quantize", lambda: kernels.quantize_store(e4m3(), fp32(4608), t(), t())
    yield (
        "quantized combine 3",
        lambda: kernels.quantized_combine(t(), t(), [e4m3()] * 3, [fp32(4608)] * 3, [0.5] * 3),
    )
    yield (
        "quantized combine 2 device",
        lambda: kernels.quantized_combine(t(), None, [e4m3()] * 2, [fp32(4608)] * 2, fp32(2)),
    )
    for k in (1, 2):
        yield f"guided sums {k}", lambda k=k: kernels.guided_sums(t(), [t()] * (k + 1))
        sums = t((1, 3 * k), torch.float64)
        yield f"guided solve {k}", lambda k=k, sums=sums: kernels.guided_solve(sums, fp32(k), 0.003)
    for name, call in _ragged(t):
        yield f"{name} ragged", call


# --- compile without a device --------------------------------------------------------------------


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


# --- read the machine code -----------------------------------------------------------------------


def _needed(ttgir: str, op: str, threads: int) -> int:
    """16-byte accesses per thread that the unmasked tensor accesses of a kernel take.

    Masked ones count where all are masked (kernels on rows).
    """
    pattern = rf"tt\.{op} ([^:]*?) (?:\{{[^}}]*\}} )?: tensor<([0-9x]+)x!tt\.ptr<\w*?(\d+)\w*>"
    operands = 1 if op == "load" else 2
    found = re.findall(pattern, ttgir)
    plain = [row for row in found if len(row[0].split(",")) == operands] or found
    sizes = [math.prod(map(int, shape.split("x"))) * int(bits) // 8 for _, shape, bits in plain]
    return sum(math.ceil(size / (threads * 16)) for size in sizes if size >= threads * 4)


@cache
def _nvidia(binary: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()

        def ask(tool: str, *flags: str) -> str:
            command = [TOOLS / tool, *flags, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = ask("cuobjdump", "--dump-resource-usage"), ask("nvdisasm", "-c", "-ndf")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": len(re.findall(r"\bLDG\S*\.128\b", code)),
        "stores": len(re.findall(r"\bSTG\S*\.128\b", code)),
        "atomics": len(re.findall(r"\b(?:REDG?|ATOM[GS]?)\b", code)),
        "fused": len(re.findall(r"\bFFMA2?\b", code)),
    }


def _amd(code: str) -> dict[str, int]:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", code)[1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        "stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", code)),
        "atomics": len(re.findall(r"\b(?:global|buffer|flat)_atomic", code)),
        "fused": len(re.findall(r"\bv_(?:pk_)?fma\w*_f32\b", code)),
    }


def _reason(error: BaseException) -> str:
    """The last line of the innermost error: Triton's start with a listing."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def inspect(case: str, arch: int | str, dtype: str) -> list[Report]:
    """One report per kernel that the case launches on `arch` with tensors of `dtype`."""
    call = dict(cases(DTYPES[dtype]))[case]
    reports = []
    with compile_only(arch) as compiled:
        try:
            call()
        except Exception as error:  # a compiler error of any kind is the finding
            return [Report(case, "?", arch, dtype, error=_reason(error))]
    for name, kernel in compiled:
        code = _amd(kernel.asm["amdgcn"]) if arch == AMD else _nvidia(kernel.asm["cubin"])
        threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
        needed = [
            0 if name in SCALAR else _needed(kernel.asm["ttgir"], op, threads)
            for op in ("load", "store")
        ]
        wide = {"loads": (code["loads"], needed[0]), "stores": (code["stores"], needed[1])}
        reports.append(Report(case, name, arch, dtype, **(code | wide)))
    return reports


def check(
    archs: Sequence[int | str] = ARCHS,
    dtypes: Sequence[str] = ("bf16", "fp32"),
    only: str = "",
    workers: int | None = None,
) -> list[Report]:
    """Reports of all cases whose name contains `only`, each kernel variant once, in fixed order."""
    names = [name for name, _ in cases(torch.float32) if only in name]
    jobs = list(product(names, archs, dtypes))
    workers = min(len(jobs), workers or os.cpu_count() or 1)
    if workers <= 1:
        found = [inspect(*job) for job in jobs]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            found = list(pool.map(inspect, *zip(*jobs, strict=True), chunksize=4))
    unique = {}
    for report in (report for reports in found for report in reports):
        scalar = report.kernel in SCALAR
        key = (report.kernel if scalar else report.case, report.kernel, report.arch, report.dtype)
        unique.setdefault(key, report)
    return list(unique.values())


def table(reports: Sequence[Report]) -> str:
    """One line per kernel variant."""
    head = f"{'case':27} {'kernel':27} {'arch':>6} {'dtype':5} {'regs':>4} {'spills':>6}"
    lines = [f"{head} {'loads':>7} {'stores':>7}  faults"]
    for r in reports:
        loads, stores = "{}/{}".format(*r.loads), "{}/{}".format(*r.stores)
        arch = f"sm_{r.arch}" if isinstance(r.arch, int) else r.arch
        lines.append(
            f"{r.case:27} {r.kernel:27} {arch:>6} {r.dtype:5} {r.registers:4} {r.spills:6} "
            f"{loads:>7} {stores:>7}  {'; '.join(r.faults()) or '-'}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastcache.triton_kernels.aot", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="sm_90 only")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--amd", action="store_true", help=f"{AMD} as well")
    parser.add_argument("--workers", type=int, help="processes, default one per core")
    options = parser.parse_args(arguments)
    archs = [*((90,) if options.quick else ARCHS), *([AMD] if options.amd else [])]
    start = time.perf_counter()
    reports = check(archs, options.dtypes, options.only, options.workers)
    failed = [report for report in reports if report.faults()]
    print(table(reports))
    print(
        f"{len(reports)} kernels, {len(failed)} refused, {time.perf_counter() - start:.0f} s; "
        "loads and stores are 16-byte accesses found / needed; nothing was run"
    )
    return 1 if failed or not reports else 0


if __name__ == "__main__":
    raise SystemExit(main())
