# SPDX-License-Identifier: Apache-2.0
"""What fastcache.tune finds on trained models: against the full sweep, and against solvers at equal time.

    python -m bench tune --json bench/results/tune-cpu.jsonl
    python -m bench tune --model video --part solvers

Five parts. "curve": PSNR to the converged run by solver and steps, without a cache and with one. "solvers": the run
that tune finds at twice the speed of 28 Euler steps, with the number of steps free, beside every solver at that time.
"sweep": what tune finds at a speed-up, beside the best of all settings that `bench quality` sweeps, on the same seeds
and by the same measured time. "few": what tune says of a distilled model's few steps. "plans": what `Calibration.plan`
makes of one calibrated run, beside evenly spread steps. Seeds that no search has seen
judge what was found.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import fastcache
from fastcache import Guided, Recipe, Spread, Taylor
from fastcache.calibration.planner import Cost
from fastcache.configs.given import settings_of
from fastcache.demo import metrics
from fastcache.demo.solvers import SOLVERS
from fastcache.tuning.candidates import Candidate
from fastcache.tuning.generation import Generation
from fastcache.tuning.goal import Goal
from fastcache.tuning.journal import Journal
from fastcache.tuning.lab import Lab

from . import common
from .common import Row
from .quality import calibrate
from .subjects import MODES, SUBJECTS, Cell, Subject
from .sweeps import points

PARTS = ("curve", "solvers", "sweep", "few", "plans")
# steps of a distilled model, and speed-ups that are asked for
FEW = ((8, 1.25), (8, 1.5), (8, 1.6), (8, 1.8), (4, 1.25), (4, 1.8))
USUAL, LONG, QUICK_LONG = 28, 50, 10  # steps
SEEDS = (0, 1)  # that a search sees
UNSEEN = (5, 6, 7, 8)
CONVERGED = 400  # steps of the second-order solver that stand for the exact solution
PLANNED = (8, 10, 12, 14, 16)  # computed steps of plans, and what predicts
PLANNERS = {
    "Taylor 1": Taylor(1, "exact"),
    "Taylor 2, step 0 forgotten": Taylor(2, "exact", skip_first=True),
    "modulated guide, order 1": Guided(1, "modulated"),
}
COUNTS = (7, 10, 14, 16, 20, 28)
SPEEDUPS = (1.5, 2.0, 2.5, 3.0)


class Bench:
    """One model and its converged pictures."""

    def __init__(self, name: str, batch: int, quick: bool = False, guidance: str = "none") -> None:
        self.name, self.subject = name, SUBJECTS[name]()
        self.model, self.labels = self.subject.load(), torch.arange(batch) % self.subject.labels
        self.scale = None if guidance == "none" else self.subject.guidance
        self.counts = (4, 6, 8) if quick else COUNTS
        self.converged = 2 * QUICK_LONG if quick else CONVERGED

    @cached_property
    def exact(self) -> dict[int, Tensor]:
        return {s: self.sample(self.converged, s, "ab2") for s in UNSEEN}

    def sample(self, steps: int, seed: int, solver: str = "euler", cache: Any = None) -> Tensor:
        return self.subject.generate(
            self.model, self.labels, steps=steps, seed=seed, cache=cache, solver=solver,
            guidance=self.scale,
        )  # fmt: skip

    def generation(self, solver: str) -> Callable[..., Tensor]:
        """What tune is given."""

        def generate(cache: Any, num_inference_steps: int = USUAL, seed: int = 0) -> Tensor:
            return self.sample(num_inference_steps, seed, solver, cache)

        return generate

    def nearness(self, reference: dict[int, Tensor], run: Callable[[int], Tensor]) -> float:
        """Mean PSNR to a reference over the seeds that no search has seen."""
        return statistics.fmean(metrics.psnr(run(s), reference[s]) for s in UNSEEN)

    def cached(self, recipe: Recipe | None, steps: int, solver: str) -> Callable[[int], Tensor]:
        def run(seed: int) -> Tensor:
            if recipe is None:
                return self.sample(steps, seed, solver)
            with fastcache.enable(self.model, recipe) as cache:
                return self.sample(steps, seed, solver, cache)

        return run


# --- against solvers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swept:
    """What the curve's cached runs are made of."""

    solvers: Sequence[str] = tuple(SOLVERS)
    warmups: Sequence[int] = (2,)
    growths: Sequence[float] = (1.0,)
    lengths: Sequence[int] = (LONG,)  # steps of a run


def curve(
    bench: Bench, solvers: Sequence[str] = tuple(SOLVERS), swept: Swept = Swept()
) -> Iterator[Row]:
    """PSNR to the converged run, by solver and computed steps; cached: longer runs, spread after a warm-up."""
    for solver in solvers:
        for steps in bench.counts:
            found = bench.nearness(bench.exact, bench.cached(None, steps, solver))
            yield {"solver": solver, "steps": steps, "computed": steps, "recipe": "", "psnr": found}
        if solver in swept.solvers:
            yield from _cached(bench, solver, swept)


def _cached(bench: Bench, solver: str, swept: Swept) -> Iterator[Row]:
    predictors = {
        "modulated guide, order 1": Guided(1, "modulated"),
        "modulated guide, order 2": Guided(2, "modulated"),
        "Taylor 2": Taylor(2, "exact"),
    }
    work = itertools.product(swept.lengths, predictors.items(), swept.warmups, swept.growths)
    for steps, (name, what), warmup, growth in work:
        name += f", warm-up {warmup}" * (warmup != 2) + f", growth {growth:g}" * (growth != 1)
        for computed in bench.counts[:-1]:
            recipe = Recipe(Spread(computed / steps, warmup, growth), what)
            found = bench.nearness(bench.exact, bench.cached(recipe, steps, solver))
            yield {
                "solver": solver, "steps": steps, "recipe": name, "psnr": found,
                "computed": len(recipe.plan(steps).computed),
            }  # fmt: skip


def solvers(bench: Bench) -> Iterator[Row]:
    """What tune finds at twice the speed of 28 steps, and every solver at that time."""
    usual = bench.nearness(bench.exact, bench.cached(None, USUAL, "euler"))
    for solver in ("euler", "ab2"):
        found = fastcache.tune(
            bench.generation(solver), bench.model, speedup=2, steps="any", reference="converged",
            seeds=SEEDS, progress=False,
        )  # fmt: skip
        row = found.rows[0]
        # so many uncached steps take as long; a whole one more where it is no whole number
        steps = -int(-USUAL / row.speedup // 1)
        at_time = {s: bench.nearness(bench.exact, bench.cached(None, steps, s)) for s in SOLVERS}
        yield {
            "solver": solver, "found": row.name, "steps": row.steps, "computed": row.computed,
            "speedup": row.speedup, "psnr_seen": row.psnr, "usual": usual, "steps_at_that_time": steps,
            "psnr": bench.nearness(bench.exact, bench.cached(found.best, row.steps, solver)),
            "at_that_time": at_time, "recipe": found.best.to_dict() if found.best else None,
            "seconds": found.evidence["seconds_of_the_tuning"],
        }  # fmt: skip


def few(bench: Bench) -> Iterator[Row]:
    """What tune says of few steps."""
    for steps, speedup in FEW:
        found = fastcache.tune(
            bench.generation("euler"), bench.model, steps=steps, speedup=speedup, seeds=SEEDS,
            progress=False,
        )  # fmt: skip
        best = found.rows[0]
        yield {
            "steps": steps, "speedup": speedup, "found": best.name, "computed": best.computed,
            "found_speedup": best.speedup, "psnr": best.psnr, "cached": best.recipe is not None,
            "said": found.verdict,
        }  # fmt: skip


def plans(bench: Bench) -> Iterator[Row]:
    """Plans of every cost from one calibrated run, and evenly spread steps, on other seeds."""
    calibration = fastcache.calibrate(
        lambda cache: bench.sample(USUAL, SEEDS[0], cache=cache), bench.model
    )
    reference = {s: bench.sample(USUAL, s) for s in UNSEEN}
    for (name, what), computed in itertools.product(PLANNERS.items(), PLANNED):
        recipes = {"even": Recipe(Spread(computed / USUAL, 2), what)}
        recipes |= {c: calibration.plan(computed, what, cost=c, first=2) for c in get_args(Cost)}
        for way, recipe in recipes.items():
            found = bench.nearness(reference, bench.cached(recipe, USUAL, "euler"))
            yield {"predictor": name, "computed": computed, "way": way, "psnr": found}


# --- against the sweep --------------------------------------------------------------------------------------


def sweep(bench: Bench, path: str | None = None) -> Iterator[Row]:
    """What tune finds at each speed-up, and the best of the sweep at that cost. path: of a journal of the sweep."""
    generation = Generation(bench.generation("euler"), bench.model)
    settings = {"model": bench.name, "batch": len(bench.labels), "guidance": bench.scale}
    journal = Journal(None if path is None else Path(path), settings)
    lab = Lab(generation, USUAL, USUAL, SEEDS, journal, None, lambda done, name: None)
    lab.begin()
    work = list(_swept(bench.name, bench.subject))
    with common.bar(len(work), f"{bench.name}: sweep") as progress:
        for candidate in work:
            for seed in SEEDS:
                lab.measure(candidate, seed)
            progress.update()
    # whole runs of the settings alone; what the lab times beside them is left out
    spent = sum(sum(t.ratios) for t in lab.trials.values()) * lab.seconds
    swept = tuple(lab.trials.values())
    reference = {s: bench.sample(USUAL, s) for s in UNSEEN}
    for speedup in SPEEDUPS:
        start = time.thread_time()
        found = fastcache.tune(
            bench.generation("euler"), bench.model, speedup=speedup, seeds=SEEDS, progress=False
        )
        seconds = time.thread_time() - start
        goal = Goal(speedup)
        best = max((t for t in swept if t.psnr), key=lambda t: goal.rank(lab, t))
        row = found.rows[0]
        beside = lab.measure(Candidate(row.name, row.recipe, row.steps), SEEDS[0])
        run_best = bench.cached(best.candidate.recipe, best.candidate.steps, "euler")
        yield {
            "speedup": speedup, "found": row.name, "computed": row.computed, "psnr": row.psnr,
            "found_speedup": row.speedup, "found_speedup_beside": 1 / lab.expected(beside),
            "best": best.candidate.name, "best_computed": best.computed,
            "best_psnr": best.quality, "best_speedup": 1 / lab.expected(best),
            "unseen": bench.nearness(reference, bench.cached(found.best, row.steps, "euler")),
            "best_unseen": bench.nearness(reference, run_best),
            "points": len(work), "seconds": seconds, "sweep_seconds": spent, "runs": found.evidence["runs"],
        }  # fmt: skip


def _swept(name: str, subject: Subject) -> Iterator[Candidate]:
    cell = Cell(name, "fp32", USUAL, "none")
    for point in points(cell, calibrate(subject, cell), subject.output):
        label = " ".join(part for part in point.key[1:] if part)
        if point.steps is not None:
            yield Candidate(label, None, point.steps)
        elif point.config is not None:
            yield Candidate(label, settings_of(point.config)[0], USUAL)


def main(argv: list[str] | None = None) -> int:
    p = common.parser("tune", __doc__)
    p.add_argument("--model", nargs="+", choices=list(SUBJECTS), default=["flux", "video"])
    p.add_argument("--guidance", choices=MODES[:2], default="none")
    p.add_argument(
        "--solver", nargs="+", choices=list(SOLVERS), default=list(SOLVERS), help="of the curve"
    )
    p.add_argument(
        "--cached",
        nargs="+",
        choices=list(SOLVERS),
        default=list(SOLVERS),
        help="those of them with cached runs",
    )
    p.add_argument("--warmup", nargs="+", type=int, default=[2], help="of the curve's cached runs")
    p.add_argument("--growth", nargs="+", type=float, default=[1.0], help="of their gaps")
    p.add_argument("--steps", nargs="+", type=int, default=[LONG], help="of the cached runs")
    p.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS[:3]))
    p.add_argument("--journal", help="file that keeps the runs of the sweep, for one model")
    p.add_argument("--batch", type=int, default=4, help="pictures of a run")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = common.read_lines(args.json) if args.resume else []
    if args.quick:
        args.model, args.part, args.batch, args.steps = args.model[:1], ["curve"], 1, [QUICK_LONG]
    swept = Swept(args.cached, args.warmup, args.growth, args.steps)
    makers = {
        "curve": partial(curve, solvers=args.solver, swept=swept),
        "solvers": solvers,
        "sweep": partial(sweep, path=args.journal),
        "few": few,
        "plans": plans,
    }
    for name in args.model:
        bench = Bench(name, args.batch, args.quick, args.guidance)
        for part in args.part:
            for row in makers[part](bench):
                head = {"bench": "tune", "part": part, "model": name, "batch": args.batch}
                head["guidance"] = args.guidance
                rows.append({**head, **row, **common.environment()})
                print({k: v for k, v in row.items() if k != "recipe"}, flush=True)
                if args.json:
                    common.write_lines(args.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
