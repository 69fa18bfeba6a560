# SPDX-License-Identifier: Apache-2.0
"""Which elements each program reads and writes where offsets pass 2**31 and samples lie far apart.

Kernels run in Triton's interpreter on addresses alone: what lies in a reserved range of them is
neither read nor written, only noted. Chosen programs must touch exactly the elements that are theirs
in every tensor: every P-th block of B elements, where P programs share a sample. All programs on
small tensors are the business of `test_triton_interpreter.py`.
Started as a script, this file is the child process that interprets.
"""

from __future__ import annotations

import builtins
import json
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

SLOT = 1 << 34  # bytes from one tensor to the next
SLOTS = 8
NORESERVE = 0x4000  # Linux: address space alone
Intervals = list[tuple[int, int]]


def merged(found: Intervals) -> Intervals:
    """Sorted and joined; touching an element twice is an error."""
    joined: Intervals = []
    for first, end in sorted(found):
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], end
        else:
            assert not joined or joined[-1][1] < first, f"{first} is touched twice"
            joined.append((first, end))
    return joined


# --- in the child ------------------------------------------------------------------------------


@dataclass
class Bench:
    """Reserved addresses, and what each program touched there: kind and slot to intervals."""

    all: int = 0
    programs: list[int] = field(default_factory=list)
    touched: list[dict[tuple[str, int], Intervals]] = field(default_factory=list)

    def __post_init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        self.memory = torch.frombuffer(mmap.mmap(-1, SLOTS * SLOT, flags=flags), dtype=torch.uint8)
        self.start = self.memory.data_ptr()

    def tensor(self, slot: int, dtype: torch.dtype, *shape: int) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        assert size <= SLOT
        return self.memory[slot * SLOT : slot * SLOT + size].view(dtype).view(shape)

    def note(self, kind: str, pointers: Any, mask: Any) -> bool:
        """Whether these are addresses of the bench."""
        addresses = pointers.data.reshape(-1).astype("int64") - self.start
        if not 0 <= addresses[0] < SLOTS * SLOT:
            return False
        addresses = addresses[mask.data.reshape(-1).astype(bool)]
        if len(addresses):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            slot = int(addresses[0] // SLOT)
            offsets = addresses - slot * SLOT
            offsets.sort()
            assert not (offsets % size).any()
            elements = offsets // size
            cuts = [0, *(elements[1:] - elements[:-1] != 1).nonzero()[0] + 1, len(elements)]
            runs = [(int(elements[a]), int(elements[b - 1]) + 1) for a, b in pairwise(cuts)]
            self.touched[-1].setdefault((kind, slot), []).extend(runs)
        return True


def watch(bench: Bench) -> None:
    """Put the bench between the interpreter and memory; it also chooses the programs that run."""
    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    load, store, index = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.set_grid_idx,
    )

    def watched_load(pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        if not bench.note("read", pointers, mask):
            return load(pointers, mask, other, *rest)
        dtype = pointers.get_element_ty()
        zeros = np.zeros(pointers.data.shape, dtype=interpreter._get_np_dtype(dtype))
        return interpreter.TensorHandle(zeros, dtype)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if not bench.note("written", pointers, mask):
            return store(pointers, value, mask, *rest)

    def watched_index(*at: int) -> None:
        bench.touched.append({})
        index(*at)

    def chosen(*bounds: Any) -> Any:
        return bench.programs if bounds == (bench.all,) else range_(*bounds)

    range_ = builtins.range
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.set_grid_idx = watched_index
    interpreter.range = chosen
    executor = interpreter.GridExecutor
    executor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    executor._restore_args_dev = lambda *args: None


def touched(bench: Bench, op: str, shape: list[int], cut: int) -> dict[str, Any]:
    """What the chosen programs of an op touch on tensors of this shape, less `cut` tokens in front.

    Answers with programs per sample, elements per sample, distances, and what was touched.
    """
    from fastcache.triton_kernels.launcher import Launcher

    from fastcache import triton_kernels as kernels

    y, x, prev, out = (bench.tensor(slot, torch.float16, *shape) for slot in range(4))
    q = bench.tensor(4, torch.float8_e4m3fn, *shape)
    y, x, prev, out, q = (t[:, cut:] if cut else t for t in (y, x, prev, out, q))
    samples = 1 if y.is_contiguous() else y.shape[0]
    scale = torch.ones(y.shape[:-1] if op.startswith("quantize") else 1)
    n = y.numel() // samples
    flat = y.dim() == 2  # the batch of one that x is, where it has to have one
    held, kept = (t[None] if flat else t for t in (prev, out))
    rows = [torch.zeros(1, 1, y.shape[-1], dtype=y.dtype)] * 2
    bench.touched.clear()
    launch = Launcher.launch

    def on_chosen(self: Any, plan: Any, *args: Any) -> None:
        bench.all = plan.programs
        each, last = plan.programs // samples, plan.programs - 1
        tail = last - each + 1 + (math.ceil(n / BLOCKS[op](y.shape[-1])) - 1) % each
        bench.programs = sorted({0, 1, each - 1, each % plan.programs, tail, last})
        launch(self, plan, *args)

    calls = {
        "store": lambda: kernels.residual_store(out, y, x),
        "taylor": lambda: kernels.taylor_update([x, prev, out], y, 0.5, 3),
        "l1": lambda: kernels.residual_l1(y, x, prev, out),
        "magnitude": lambda: kernels.residual_magnitude(y, x, prev, out),
        "modulated": lambda: kernels.modulated_l1(y[None] if flat else y, *rows, held, kept),
        "guided": lambda: kernels.guided_sums(y, [x, prev, out]),
        "quantize": lambda: kernels.quantize_store(q, scale, y, x),
        "quantized": lambda: kernels.quantized_combine(out, y, [q], [scale], [0.5]),
    }
    Launcher.launch = on_chosen
    calls[op]()
    Launcher.launch = launch
    return {
        "programs": bench.programs,
        "each": bench.all // samples,
        "n": n,
        "start": cut * y.shape[-1],
        "stride": y.stride(0) if samples > 1 else 0,
        "touched": [
            {f"{kind} {slot}": merged(found) for (kind, slot), found in program.items()}
            for program in bench.touched
        ],
    }


def serve(op: str) -> dict[str, Any]:
    """What the programs of an op touch, by shape."""
    from fastcache.triton_kernels import reduction

    bench, reduction.PROGRAMS = Bench(), 2**15  # each takes dozens of blocks then, not thousands
    watch(bench)
    return {name: touched(bench, op, *SHAPES[name]) for name in shapes_of(op)}


# --- the tests ---------------------------------------------------------------------------------


def row_block(elements: int) -> Callable[[int], int]:
    """Elements of a tile of whole rows, of which `elements` are in registers at a time."""

    def block(width: int) -> int:
        columns = next((c for c in (64, 128, 256, 512) if width <= c), 1024)
        return elements // columns * width

    return block


# Elements of one step of a program, by row width.
BLOCKS: dict[str, Callable[[int], int]] = {
    "store": lambda width: 4096,
    "taylor": lambda width: 2048,
    "l1": lambda width: 4096,
    "magnitude": row_block(2048),
    "modulated": lambda width: 4 * width,
    "guided": row_block(2048),
    "quantize": lambda width: {1000: 4, 1024: 4, 1023: 4, 4096: 1, 9000: 1}[width] * width,
    "quantized": row_block(4096),
}
# What is read and written: slots are those of y, x, prev, out and q.
ACCESSES = {
    "store": ("read 0", "read 1", "written 3"),
    "taylor": ("read 0", "read 1", "read 2", "written 1", "written 2", "written 3"),
    "l1": ("read 0", "read 1", "read 2", "written 3"),
    "magnitude": ("read 0", "read 1", "read 2", "written 3"),
    "modulated": ("read 0", "read 2", "written 3"),
    "guided": ("read 0", "read 1", "read 2", "read 3"),
    "quantize": ("read 0", "read 1", "written 4"),
    "quantized": ("read 0", "read 4", "written 3"),
}
ROWS = 2**31 // 1024
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "below 2**31": ((2**31 - 3, 1), 0),
    "beyond 2**31": ((2**31 + 5, 1), 0),
    "beyond 2**32": ((2**32 + 4099, 1), 0),
    "rows below 2**31": ((ROWS - 1, 1024), 0),
    "rows beyond 2**31": ((ROWS + 3, 1024), 0),
    "odd rows beyond 2**31": ((2**31 // 1000 + 5, 1000), 0),
    "a token range": ((2, ROWS + 5, 1024), 5),
    "an odd token range": ((2, ROWS + 9, 1023), 1),
}
ELEMENTWISE = ("store", "taylor", "l1")


def shapes_of(op: str) -> list[str]:
    """Elementwise ops take any shape; the others need rows."""
    return [name for name in SHAPES if op in ELEMENTWISE or "row" in name or "token" in name]


def own(program: int, each: int, block: int, n: int, start: int, stride: int) -> Intervals:
    """The elements of a program: every `each`-th block of its sample."""
    sample, first = divmod(program, each)
    base = start + sample * stride
    blocks = range(first, math.ceil(n / block), each)
    return merged([(base + k * block, base + min((k + 1) * block, n)) for k in blocks])


@cache
def found(op: str) -> dict[str, Any]:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, op]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space as Linux does")
@pytest.mark.parametrize(("op", "shape"), [(op, s) for op in BLOCKS for s in shapes_of(op)])
def test_a_program_touches_its_own_elements_and_no_others(op: str, shape: str) -> None:
    pytest.importorskip("triton")
    got = found(op)[shape]
    assert len(got["touched"]) == len(got["programs"]) >= 3
    block = BLOCKS[op](SHAPES[shape][0][-1])
    # the programs of a sample have all its blocks between them, and none is without
    assert got["each"] <= math.ceil(got["n"] / block)
    for program, touched in zip(got["programs"], got["touched"], strict=True):
        layout = (got["each"], block, got["n"], got["start"], got["stride"])
        want = [list(interval) for interval in own(program, *layout)]
        assert touched == dict.fromkeys(ACCESSES[op], want), f"program {program}"


if __name__ == "__main__":
    print(json.dumps(serve(sys.argv[1])))
