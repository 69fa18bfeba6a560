# SPDX-License-Identifier: Apache-2.0
"""Speed and quality on trained models: every method's sweep, peers, and fewer steps.

    python -m bench quality --json out.jsonl
    python -m bench quality --model video --dtype bf16

The same noise for all. Compute is floating-point operations of the transformer, as a share of the
uncached run. Rows compare within a cell: one model, dtype, number of steps and guidance. With
--resume, points that the file holds are not measured again.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from . import common, systems
from .cells import KEY, cell_of, cells, frontier
from .common import Row
from .few_steps import short_points
from .method_sweeps import named_points
from .points import Point
from .subjects import DTYPES, MODES, SUBJECTS, Cell, Subject
from .sweeps import points

SOLUTION = 100  # steps of the run that stands for the exact solution


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# the CPU's attention, which the counter does not know
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class Announced:
    """What the sampler sees of a cache: sets the clock, then opens the system's own context."""

    def __init__(self, attached: systems.Attached) -> None:
        self.attached = attached

    @contextmanager
    def context(
        self, name: str, step_index: int, num_inference_steps: int, timestep: float, sigma: float
    ) -> Any:
        systems.CLOCK["t"] = timestep
        with self.attached.context(name, step_index, num_inference_steps, timestep, sigma):
            yield


class Bench:
    """A model, the noise and the reference samples of one cell."""

    def __init__(self, subject: Subject, cell: Cell, seeds: int) -> None:
        self.subject, self.cell = subject, cell
        self.model = subject.load()
        self.labels = torch.arange(seeds) % subject.labels
        self.scale = None if cell.guidance == "none" else subject.guidance
        self.exact = None  # the uncached run in fp32, where rounding alone makes a difference
        if cell.dtype != "fp32":
            self.exact = self._generate(self.model, cell.steps, torch.float32)
            with systems.quietly():
                self.model = self.model.to(DTYPES[cell.dtype])
        self.reference, self.flops = self.generate(self.model, cell.steps)

    def generate(
        self, model: nn.Module, steps: int, attached: systems.Attached | None = None
    ) -> tuple[Tensor, int]:
        """Samples and the operations that they took."""
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            samples = self._generate(model, steps, DTYPES[self.cell.dtype], attached)
        return samples, counter.get_total_flops()

    def _generate(
        self,
        model: nn.Module,
        steps: int,
        dtype: torch.dtype,
        attached: systems.Attached | None = None,
    ) -> Tensor:
        return self.subject.generate(
            model,
            self.labels,
            steps=steps,
            guidance=self.scale,
            batched_guidance=self.cell.guidance == "batched",
            cache=None if attached is None else Announced(attached),
            dtype=dtype,
        )

    def solve(self) -> Tensor | None:
        """Samples of a run that stands for the exact solution; a distilled model has none."""
        return None if self.subject.steps else self.generate(self.model, SOLUTION)[0]

    def row(self, point: Point, solution: Tensor | None) -> Row:
        """Quality of one point; upstream that cannot run is a row with an error."""
        from fastcache.demo import metrics

        head = {**self.cell._asdict(), "seeds": len(self.labels)}
        row: Row = {**head, **dict(zip(KEY, point.key, strict=True))}
        model = copy.deepcopy(self.model)
        attached = None
        try:
            with systems.quietly():
                if point.attach is not None:
                    attached = point.attach(model)
                samples, flops = self.generate(model, point.steps or self.cell.steps, attached)
                row["cache_bytes"] = attached.nbytes() if attached else 0
                if attached is not None:
                    attached.detach()
        except Exception as error:
            return row | {"error": f"{type(error).__name__}: {error}"[:160], "psnr": None}
        quality = metrics.psnr(samples, self.reference)
        planes, expected = (x.reshape(-1, 1, *x.shape[-2:]) for x in (samples, self.reference))
        row |= {
            "compute": flops / self.flops,
            "psnr": None if math.isinf(quality) else quality,
            "relative_l2": metrics.relative_l2(samples, self.reference),
            "ssim": metrics.ssim(planes, expected),
            **self.subject.judge(samples, self.labels),
            "psnr_solution": None if solution is None else metrics.psnr(samples, solution),
        }
        if self.exact is not None:
            row["psnr_fp32"] = metrics.psnr(samples, self.exact)
        return row


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    for package in ("diffusers", "cache-dit"):
        if reason := systems.missing(package):
            print(reason)
    if systems.missing("diffusers"):
        print("the trained model is diffusers' own class: nothing can be measured")
        return 0
    if args.quick:
        args.steps, args.guidance, args.seeds = [8], ["none"], 4
    rows = common.read_lines(args.json) if args.resume else []
    environment = common.environment()
    for key in itertools.product(args.model, args.dtype, args.steps, args.guidance):
        _sweep(args, rows, Cell(*key), environment)
    if args.json:
        common.write_lines(args.json, rows)
    show(rows)
    if args.plot:
        from .figures import save
        from .quality_figures import quality_figure

        save(quality_figure(rows), args.plot)
    return 0


def _sweep(args: Any, rows: list[Row], cell: Cell, environment: Row) -> None:
    """Measure what `rows` does not hold yet; every finished point is written at once."""
    subject = SUBJECTS[cell.model]()
    if args.named:
        work, bench_name = list(named_points(cell, subject)), "methods"
    elif subject.steps:
        work, bench_name = list(short_points(cell, calibrate(subject, cell))), "quality"
    else:
        work, bench_name = list(points(cell, calibrate(subject, cell), subject.output)), "quality"
    if args.quick:
        kinds = {p.key[:2]: p for p in work}
        work = list(kinds.values())
    if args.method:
        work = [p for p in work if p.method in args.method or p.system in args.method]
    if args.setting:
        work = [p for p in work if re.search(args.setting, " ".join(p.key))]
    have = {
        tuple(r[k] for k in KEY) for r in rows if (cell_of(r), r["seeds"]) == (cell, args.seeds)
    }
    whole = Point("uncached", "uncached", "", f"{cell.steps} steps", None, cell.steps)
    work = [p for p in (whole, *work) if work and p.key not in have]
    if not work:
        return
    bench = Bench(subject, cell, args.seeds)
    solution = bench.solve() if not args.quick else bench.reference
    with common.bar(len(work), cell.title) as progress:
        for point in work:
            progress.set_postfix_str(" ".join(point.key))
            row = {"bench": bench_name, **bench.row(point, solution), **environment}
            _keep(args.json, rows, row)
            progress.update()


def _keep(path: Path | None, rows: list[Row], row: Row) -> None:
    """Put a finished row after the others, in the file too."""
    rows.append(row)
    if path:
        common.write_lines(path, [row], append=len(rows) > 1)


def calibrate(subject: Subject, cell: Cell) -> list[float]:
    from fastcache.demo.run import calibrate as measure

    dtype = DTYPES[cell.dtype]
    sample = functools.partial(subject.generate, dtype=dtype)
    with systems.quietly():
        model = subject.load().to(dtype)
    return measure(model, cell.steps, sample)


def show(rows: list[Row]) -> None:
    for cell, here in cells(rows):
        table: list[list[object]] = []
        for row in here:
            name = " ".join(str(row[k]) for k in KEY[1:] if row[k])
            if row.get("error"):
                table.append([row["system"], name, "", row["error"][:60]])
                continue
            found = [f"{row['compute']:.1%}", _number(row["psnr"]), f"{row['relative_l2']:.4f}"]
            judged = "-" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
            found += [f"{row['ssim']:.4f}", judged, _number(row["frechet"])]
            bytes_ = row["cache_bytes"]
            found += [_number(row["psnr_solution"]), f"{bytes_ / 2**20:.2f}" if bytes_ else ""]
            table.append([row["system"], name, *found])
        columns = ["system", "method", "compute", "PSNR", "rel. L2", "SSIM", "judge", "Fréchet"]
        title = f"{cell.title}, {here[0]['seeds']} seeds"
        common.print_table(title, [*columns, "PSNR to exact", "cache MiB"], table)
        lines = [
            [
                f"{f['budget']:.0%}",
                *(_number(f[k]) for k in ("fastcache", "diffusers", "cache-dit", "uncached")),
                _number(f["reuse"]),
                f["fastcache setting"],
            ]
            for f in frontier(here)
        ]
        columns = ["compute at most", "fastcache", "diffusers", "cache-dit", "fewer steps"]
        common.print_table("best PSNR in dB", [*columns, "our reuse", "our best"], lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _parser() -> Any:
    p = common.parser("quality", __doc__)
    p.add_argument("--model", nargs="+", choices=list(SUBJECTS), default=["flux"])
    p.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32"])
    p.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    p.add_argument("--guidance", nargs="+", choices=MODES, default=["none", "sequential"])
    p.add_argument("--seeds", type=int, default=64, help="images, each with its own noise")
    p.add_argument("--method", nargs="+", help="only these methods or systems")
    p.add_argument(
        "--named",
        action="store_true",
        help="the methods that people know by name, a benchmark of their own",
    )
    p.add_argument("--setting", help="only settings in whose whole name this expression is found")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
