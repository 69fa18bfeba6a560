# SPDX-License-Identifier: Apache-2.0
"""Fill Triton's cache for an absent GPU: every kernel of the tests, the gate and the benchmarks.

The cases run on host tensors, with the addresses and sizes that decide what Triton specialises; a
launch compiles, and computes nothing. Started by `bench.gpu.kit`, with assertions off.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import SimpleNamespace

import torch
import triton
from fastcache.triton_kernels import aot
from torch import Tensor
from triton.runtime import build

from fastcache import triton_kernels

ARCHITECTURE = 90
PARTS = 8
DTYPES = (torch.bfloat16, torch.float32)


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that is launched, in pieces."""
    sys.path[:0] = ["tests", "tests/ops"]
    import test_triton_interpreter as tests

    for name in tests.CASES:
        yield name, partial(tests.run, name, triton_kernels, "cpu")
    for dtype in aot.DTYPES.values():
        yield from ((f"{name} {dtype}", call) for name, call in aot.cases(dtype).items())
    for dtype in DTYPES:
        for shape in ((4608, 3072), (2, 4096, 3072), (17776, 3072), (32760, 5120), (2, 512, 3072)):
            yield f"{shape} {dtype}", partial(at_size, shape, dtype)
    yield "beyond 2**31", beyond


def at_size(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What `test_triton_gpu` and `bench.gpu.kernels` launch."""

    def t() -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    k, sums = triton_kernels, torch.empty(1, 6, dtype=torch.float64, device="meta")
    weights = torch.empty(3, device="meta")
    k.residual_l1(t(), t(), t(), t())
    k.residual_l1(t(), t(), t())
    k.residual_magnitude(t(), t(), t(), t())
    k.residual_magnitude(t(), t(), t())
    k.residual_store(t(), t(), t())
    k.residual_apply(t(), t(), t())
    for count in (2, 3):
        k.linear_combine(t(), [t() for _ in range(count)], [0.5] * count)
        k.linear_combine(t(), [t() for _ in range(count)], weights[:count])
        k.combine_samples(
            t(), [t() for _ in range(count)], torch.empty(shape[0], count, device="meta")
        )
        k.guided_sums(t(), [t() for _ in range(count)])
    k.taylor_update([t(), t(), t()], t(), 0.5, 3)
    k.guided_solve(sums, torch.empty(2, device="meta"), 0.003)


def beyond() -> None:
    """Sizes and strides that need 64 bits."""
    x = torch.empty(2**31 + 4099, dtype=torch.float16, device="meta")
    rows = x[: 2**31].view(2, 2**20, 1024)[:, -64:]
    triton_kernels.residual_apply(x, x, x)
    triton_kernels.residual_l1(x, x, x)
    triton_kernels.residual_apply(rows, rows, rows)


def compile_part(part: int) -> tuple[int, list[str]]:
    """Kernels compiled by every PARTS-th call, and what went wrong."""
    torch.testing.assert_close = lambda *_, **__: None
    build._load_module_from_path = lambda *_: SimpleNamespace(launch=None)  # needs a driver
    wrong = []
    with aot.compile_only(ARCHITECTURE) as compiled:
        for name, call in list(calls())[part::PARTS]:
            try:
                said = call()
            except Exception:
                said = traceback.format_exc()
            if isinstance(said, str) and said:
                wrong.append(f"{name}: {said.strip().splitlines()[-1]}")
        make_launchers([kernel for _, kernel in compiled])
    return len(compiled), wrong


def make_launchers(kernels: Sequence[triton.compiler.CompiledKernel]) -> None:
    """The C code that launches each signature, compiled; and Triton's own part of it."""
    from triton.backends.nvidia import driver

    build.compile_module_from_src(
        src=(driver.Path(driver.dirname) / "driver.c").read_text(),
        name="cuda_utils",
        library_dirs=driver.library_dirs(),
        include_dirs=driver.include_dirs,
        libraries=driver.libraries,
    )
    for kernel in kernels:
        driver.CudaLauncher(kernel.src, kernel.metadata)


def main() -> int:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(PARTS, os.cpu_count() or 1), mp_context=spawn) as pool:
        found = list(pool.map(compile_part, range(PARTS)))
    wrong = [line for _, lines in found for line in lines]
    print(f"{sum(count for count, _ in found)} launches, {len(wrong)} cases cut short")
    for line in wrong[:20]:
        print(f"  {line}"[:200])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
