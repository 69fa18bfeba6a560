# SPDX-License-Identifier: Apache-2.0
"""Each op, timed by the replay of a CUDA graph over buffers larger than the cache; and on the host.

A graph holds several calls, each on the next set of buffers, so that the device never waits for the
host and never finds a tensor where the call before left it. Every contender takes turns with a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

import fastcache
from fastcache.ops import dispatch

from .. import common
from ..chains import OPS, Buffers, Op
from ..common import Row
from ..ops import BACKENDS, LARGE, QUICK, SHAPES, buffers
from .correctness import kernels_of
from .session import Session, times

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COMPILED = ("residual_l1 + store", "linear_combine of 3")
CALLS, ROUNDS, HOST_CALLS = 8, 15, 100
ASLEEP = 60_000_000  # cycles, some 30 ms: longer than the host takes to enqueue its calls
Run = Callable[[Buffers], Any]


class Cell(NamedTuple):
    """One op on tensors of one size."""

    op: Op
    model: str
    shape: tuple[int, int]
    dtype: str

    @property
    def columns(self) -> Row:
        return {
            "op": self.op.name,
            "model": self.model,
            "shape": list(self.shape),
            "dtype": self.dtype,
        }


def run(session: Session) -> None:
    large = QUICK if session.dry else {"FLUX": SHAPES["FLUX"], **LARGE}
    small = dict(list(large.items())[:1])
    for cell in cells(large):
        for name, call in contenders(cell.op, session.device).items():
            measure(session, cell, name, call)
    for cell in cells(small, ("bf16",)):
        if "y" in cell.op.tensors.split():
            for name, call in contenders(cell.op, session.device).items():
                measure(session, cell, name, call, warm=True)
    for cell in cells(small, ("bf16",)):
        for name, call in contenders(cell.op, session.device).items():
            measure_host(session, cell, name, call)
    for cell in cells(small, ("bf16",)):
        if cell.op.name in COMPILED and not session.dry:
            for name, chain in cell.op.compiled.items():
                measure(session, cell, name, torch.compile(chain, dynamic=False))


def cells(
    shapes: dict[str, tuple[int, int]], dtypes: Sequence[str] = tuple(DTYPES)
) -> Iterator[Cell]:
    for dtype in dtypes:
        for model, shape in shapes.items():
            yield from (Cell(op, model, shape, dtype) for op in OPS)


def contenders(op: Op, device: str) -> dict[str, Run]:
    """Backends with a kernel of their own for the op, then the eager chain of diffusers."""
    found: dict[str, Run] = {}
    for backend in kernels_of(device):
        if has_kernel(op, backend):
            found[BACKENDS[backend]] = partial(forced, op, backend)
    return found | {name: chain for name, chain in op.eager.items() if name == "diffusers"}


def has_kernel(op: Op, backend: str) -> bool:
    """Whether a backend has a kernel for the op, or lends the reference's."""
    name = op.name.split()[0].replace("guided_weights", "guided_sums")
    module = dispatch.function(backend, name).__module__
    return module != dispatch.BACKENDS[dispatch.REFERENCE].module


def forced(op: Op, backend: str, given: Buffers) -> Any:
    with fastcache.backend(backend):
        return op.ours(given)


# --- on the device --------------------------------------------------------------------------------------


def measure(session: Session, cell: Cell, name: str, call: Run, warm: bool = False) -> None:
    """One row: a call, and how near it comes to a copy that takes turns with it.

    warm: y is written right before, as the block would have; the time of that alone is taken off.
    """
    columns = {**cell.columns, "contender": name, "y": "warm" if warm else "cold"}
    with session.attempt("op", **columns):
        sets = buffers(cell.op, cell.shape, DTYPES[cell.dtype], session.device)
        source = torch.empty_like(next(iter(sets[0].values()))).normal_()
        calls = range(max(CALLS, len(sets)) if not session.dry else 1)

        def touch(b: Buffers) -> object:
            return b["y"].copy_(source) if warm else None

        def copy(b: Buffers) -> object:
            first, last = next(iter(b.values())), list(b.values())[-1]
            return last.copy_(first)

        def together(b: Buffers) -> None:
            touch(b)
            call(b)

        timed = {"call": together, "copy": copy} | ({"touch": touch} if warm else {})
        replays = {
            what: replay([partial(f, sets[i % len(sets)]) for i in calls], session.device)
            for what, f in timed.items()
        }
        rounds = 3 if session.dry else ROUNDS
        samples = common.interleaved(replays, rounds, session.device)
        each = {what: [s / len(calls) for s in found] for what, found in samples.items()}
        alone = common.quantiles(each["touch"])["p50"] if warm else 0.0
        values = [s - alone for s in each["call"]]
        took, copied = common.quantiles(values)["p50"], common.quantiles(each["copy"])["p50"]
        gbps = cell.op.passes * source.nbytes / took / 1e9
        row = {**times(values), "copy_us": copied * 1e6, "gbps": gbps, "passes": cell.op.passes}
        row["of_copy"] = cell.op.passes / took / (2 / copied)
        session.row("op", **columns, **row, sets=len(sets), calls=len(calls), rounds=rounds)


def replay(calls: Sequence[Callable[[], object]], device: str) -> Callable[[], object]:
    """All calls by one launch of a CUDA graph; on a CPU one after the other."""

    def one_by_one() -> None:
        for call in calls:
            call()

    if device == "cpu":
        return one_by_one
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(
        side
    ):  # what is compiled or looked up at a first call cannot be captured
        one_by_one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_by_one()
    return graph.replay


# --- on the host ----------------------------------------------------------------------------------------


def measure_host(session: Session, cell: Cell, name: str, call: Run) -> None:
    """One row: what enqueuing a call takes while the device sleeps and nothing can be waited for."""
    columns = {**cell.columns, "contender": name}
    with session.attempt("host", **columns):
        sets = buffers(cell.op, cell.shape, DTYPES[cell.dtype], session.device)
        count = 3 if session.dry else HOST_CALLS
        samples, asleep = [], True
        for _ in range(3 if session.dry else 5):
            took, slept = enqueue(lambda i: call(sets[i % len(sets)]), count, session.device)
            samples.append(took)
            asleep = asleep and slept
        session.row("host", **columns, **times(samples), calls=count, asleep=asleep)


def enqueue(call: Callable[[int], object], count: int, device: str) -> tuple[float, bool]:
    """Seconds per call on the host, and whether the device slept all the while."""
    call(0)
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda._sleep(ASLEEP)
    start = time.perf_counter()
    for i in range(count):
        call(i)
    took = (time.perf_counter() - start) / count
    return took, device == "cpu" or not torch.cuda.current_stream().query()
