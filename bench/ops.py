# SPDX-License-Identifier: Apache-2.0
"""Each cache op against the eager chains it replaces and against torch.compile of the same expression.

    python -m bench ops --json out.jsonl

A pass is one tensor read or written. GB/s counts the fewest passes the operation needs, whatever a
contender really moves, so the columns of one row compare; 100 % is a copy timed in the same rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastcache
from fastcache.ops import dispatch

from . import common
from .chains import OPS, Buffers, Op
from .common import Row
from .traffic import Traffic

SHAPES = {"FLUX": (4608, 3072), "CogVideoX": (17776, 3072)}
LARGE = {"Wan": (32760, 5120)}
QUICK = {"quick": (96, 256)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKENDS = {"reference": "reference", "cpp": "C++", "triton": "Triton", "cuda": "CUDA"}
ORDER = (
    "diffusers",
    "TeaCache",
    "cache-dit",
    "compile",
    "compile out=",
    *BACKENDS.values(),
    "copy",
)


@dataclass(frozen=True)
class Setting:
    device: str
    rounds: int
    repeat: int
    compiled: tuple[str, ...]  # words in the names of ops that torch.compile enters


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    shapes = QUICK if args.quick else SHAPES | (LARGE if args.large else {})
    chosen = [op for op in OPS if not args.op or any(word in op.name for word in args.op)]
    rounds = args.rounds or (3 if args.quick else 9)
    repeat = 20 if args.device == "cuda" and not args.quick else 1
    setting = Setting(args.device, rounds, repeat, tuple(args.compile))
    environment = common.environment(args.device)
    rows = common.read_lines(args.json) if args.resume else []
    have = {(r["model"], r["dtype"], r["op"]) for r in rows}
    cells = [(n, s, d, op) for n, s in shapes.items() for d in args.dtype for op in chosen]
    cells = [c for c in cells if (c[0], c[2], c[3].name) not in have]
    with common.bar(len(cells), "ops") as progress:
        for name, shape, dtype, op in cells:
            progress.set_postfix_str(f"{op.name} {name} {dtype}")
            found = measure(op, shape, dtype, setting)
            head = {"bench": "ops", "model": name, "shape": list(shape), "dtype": dtype}
            rows += [{**head, **row, **environment} for row in found]
            progress.update()
            if args.json:  # what was measured is kept if the run is cut short
                common.write_lines(args.json, rows)
    show(rows)
    if args.plot:
        plot(rows, args.plot)
    return 0


def measure(op: Op, shape: tuple[int, int], dtype: str, setting: Setting) -> list[Row]:
    """One row per contender."""
    sets = buffers(op, shape, DTYPES[dtype], setting.device)
    one = next(iter(sets[0].values()))
    runs = _contenders(op, setting)
    _check(op, runs, sets[0])
    traffic = {name: _traffic(op, name, run, sets[0]) for name, run in runs.items()}
    source = [torch.empty_like(one).copy_(b[next(iter(b))]) for b in sets]
    target = [torch.empty_like(one) for _ in sets]
    turn = common.Rotation(sets)
    pair = common.Rotation(list(zip(source, target, strict=True)))

    def copy() -> None:
        a, b = pair()
        b.copy_(a)

    timed: dict[str, Callable[[], object]] = {
        name: (lambda run=run: run(turn())) for name, run in runs.items()
    }
    timed["copy"] = copy
    with torch.no_grad():
        samples = common.interleaved(timed, setting.rounds, setting.device, setting.repeat)
    rows = []
    copy_speed = 2 * one.nbytes / common.quantiles(samples["copy"])["p50"]
    for name, values in samples.items():
        passes = 2 if name == "copy" else op.passes
        times = common.quantiles(values)
        speed = passes * one.nbytes / times["p50"]
        row = {"op": op.name, "what": op.what, "contender": name, **times}
        row |= {"gbps": speed / 1e9, "of_copy": speed / copy_speed}
        row |= {"min_passes": passes, "pass_bytes": one.nbytes, "rounds": setting.rounds}
        rows.append(row | traffic.get(name, {}))
    return rows


def buffers(
    op: Op, shape: tuple[int, int], dtype: torch.dtype, device: str, count: int | None = None
) -> list[Buffers]:
    """Random buffer sets, as many as it takes to exceed the last cache three times."""
    names = op.tensors.split()
    size = len(names) * math.prod(shape) * dtype.itemsize
    count = count or max(1, min(8, math.ceil(3 * common.last_cache_bytes(device) / size)))
    g = torch.Generator(device).manual_seed(0)

    def draw(name: str) -> torch.Tensor:
        t = torch.randn(shape, generator=g, device=device, dtype=torch.float32)
        # a residual is small beside what it is the residual of
        return t.mul_(1.0 if name in ("x", "y", "out") else 0.1).to(dtype)

    return [{name: draw(name) for name in names} for _ in range(count)]


def _contenders(op: Op, setting: Setting) -> dict[str, Callable[[Buffers], Any]]:
    runs = dict(op.eager)
    if any(word in op.name for word in setting.compiled):
        torch._dynamo.reset()
        for name, chain in op.compiled.items():
            runs[name] = torch.compile(chain, dynamic=False)
    for backend, label in BACKENDS.items():
        usable = dispatch.status(backend) is True
        if usable and dispatch.BACKENDS[backend].reads(setting.device):
            runs[label] = _forced(op, backend)
    return runs


def _forced(op: Op, backend: str) -> Callable[[Buffers], Any]:
    def run(buffers: Buffers) -> Any:
        with fastcache.backend(backend):
            return op.ours(buffers)

    return run


def _check(op: Op, runs: dict[str, Callable[[Buffers], Any]], buffers: Buffers) -> None:
    """Every kernel must give the reference's result before it is timed."""
    expected = None
    for label in BACKENDS.values():
        if label not in runs:
            continue
        given = {name: t.clone() for name, t in buffers.items()}
        returned = runs[label](given)
        values = [given[op.result]] if op.result else []
        values += [returned] if isinstance(returned, torch.Tensor) else []
        values = [v.float() for v in values]
        if expected is None:
            expected = values
        for got, want in zip(values, expected, strict=True):
            tolerance = 1e-5 if got.numel() <= 4 else 1e-2 * want.abs().max().item()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=tolerance)


def _traffic(op: Op, name: str, run: Callable[[Buffers], Any], buffers: Buffers) -> Row:
    """Launches, passes, temporaries and device reads: counted for eager chains, known for our ops."""
    one = next(iter(buffers.values()))
    if name in op.eager:
        with Traffic(small=one.nbytes // 16) as counted, torch.no_grad():
            run(buffers)
        row = {"launches": counted.launches, "passes": round(counted.bytes / one.nbytes, 1)}
        # sums of whole tensors are large launches with a small result, and counted as such
        return row | {"temporaries": counted.temporaries, "reads": op.reads}
    if name not in ("C++", "CUDA", "Triton"):
        return {}
    launches = (2 if name == "Triton" and (op.reads or op.finish) else 1) + op.finish
    return {"launches": launches, "passes": op.passes, "temporaries": 0, "reads": op.reads}


def show(rows: list[Row]) -> None:
    """Milliseconds and share of a copy, one line per op and contender."""
    table: list[list[object]] = []
    seen = None
    for row in rows:
        key = (row["op"], row["model"], row["dtype"])
        if seen is not None and key != seen:
            table.append([])
        title = "" if key == seen else f"{row['op']}, {row['model']} {row['dtype']}"
        seen = key
        base = speedup(rows, row, "diffusers") or speedup(rows, row, "TeaCache")
        table.append(
            [
                title,
                row["contender"],
                common.spread(row, 1e3, 2),
                f"{row['gbps']:.1f}",
                f"{row['of_copy']:.0%}",
                f"{base:.1f}x" if base else "",
                row.get("launches"),
                row.get("passes"),
                row["min_passes"],
            ]
        )
    columns = ["op", "contender", "ms p20 / p50 / p80", "GB/s", "of copy", "vs eager"]
    common.print_table("cache ops", [*columns, "launches", "passes", "at least"], table)


def speedup(rows: list[Row], row: Row, base: str) -> float | None:
    """How much faster `row` is than contender `base` in the same cell."""
    if row["contender"] == "copy":
        return None
    for other in rows:
        same = all(other[k] == row[k] for k in ("op", "model", "dtype", "threads", "device"))
        if same and other["contender"] == base:
            return other["p50"] / row["p50"]
    return None


def plot(rows: list[Row], path: Path) -> None:
    """Share of the copy bandwidth per op, one panel per shape and dtype."""
    from .figures import ops_figure, save

    save(ops_figure(rows), path)


def _parser() -> Any:
    p = common.parser("ops", __doc__)
    p.add_argument("--large", action="store_true", help="also 32760x5120 (Wan 14B)")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--op", nargs="+", help="only ops whose name contains one of these words")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--rounds", type=int, help="timed rounds")
    p.add_argument(
        "--compile",
        nargs="*",
        default=[""],
        metavar="OP",
        help="compile only ops whose name contains one of these words (none: no torch.compile)",
    )
    return p


if __name__ == "__main__":
    raise SystemExit(main())
