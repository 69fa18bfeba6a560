# SPDX-License-Identifier: Apache-2.0
"""Python cost of a reused step under cache-dit: its own, with `accelerate()`, and with `install()`.

    python -m bench engines --json out.jsonl

FLUX's own 57 blocks in diffusers' class, of a width that takes no time. cache-dit computes the first of them on
every step, so that its own cost is a step less that of the same model with that block alone, without a cache:
embedders, that block, norms and projection are paid by all sides. Contenders are interleaved in one process, in runs
of 50 steps; read the ratios. Counted too, since neither depends on what else the machine does, are calls of functions
and the instructions that the interpreter runs; time has torch's operators in it.
"""

from __future__ import annotations

import cProfile
import logging
import math
import pstats
import statistics
import sys
from collections.abc import Callable
from operator import sub
from typing import Any, NamedTuple

import torch

from fastcache.integrations import cache_dit as backend
from fastcache.integrations.cache_dit.accelerate import restore

from . import common
from .common import Row
from .overhead import BLOCKS, flux, flux_inputs
from .systems import missing, quietly

FLOOR = "first block alone"
# Steps of a run, and those at its start that are not timed: the warm-up, and what the interpreter needs to specialize
# its bytecode anew, after classes were changed. cache-dit copies its statistics on every step, so that a run that
# never ends would cost more with each.
RUN, UNTIMED = 50, 20


def nothing() -> None:
    """What cache-dit itself asks for."""


class Contender(NamedTuple):
    """One way to run cache-dit's API."""

    before: Callable[[], None]  # in force from before the model is enabled on
    during: Callable[[], None]  # while it is called
    bound: float  # of its own cost against cache-dit's


# what is installed stays so: it comes last
CONTENDERS = {
    "cache-dit": Contender(nothing, nothing, 1.0),
    "accelerate()": Contender(nothing, backend.accelerate, 0.9),
    "install()": Contender(backend.install, nothing, 0.3),
}
METHODS = {"reuse": 0, "Taylor 1": 1}


class Case(NamedTuple):
    """What is measured: what is switched on for it, what begins a run, and one step."""

    switch: Callable[[], None]
    begin: Callable[[], object]
    step: Callable[[], object]


def main(argv: list[str] | None = None) -> int:
    p = common.parser("engines", __doc__)
    p.add_argument("--rounds", type=int, help="timed rounds")
    args = p.parse_args(argv)
    if reason := missing("cache-dit") or missing("diffusers"):
        print(reason)
        return 0
    torch.set_num_threads(args.threads)
    blocks = 6 if args.quick else BLOCKS
    rounds = args.rounds or (2 if args.quick else 60)
    with torch.no_grad(), quietly():
        found = cases(blocks)
        samples = measured(found, rounds)
        functions, instructions = counted(found, calls), counted(found, executed)
        backend.uninstall()
    environment = common.environment()
    rows: list[Row] = [
        {"bench": "engines", "case": case, "method": method, "blocks": blocks}
        | common.quantiles(times)
        | {
            "own": statistics.median(map(sub, times, samples[FLOOR, ""])),  # round by round
            "functions": functions[case, method],
            "instructions": instructions[case, method],
            "rounds": rounds,
            "calls": REPEAT,
        }
        | environment
        for (case, method), times in samples.items()
    ]
    show(rows)
    if args.json:
        common.write_lines(args.json, rows)
    return 0


Named = dict[tuple[str, str], Case]  # by contender and method


def cases(blocks: int) -> Named:
    """Every contender with every method, and the floor."""
    import cache_dit

    inputs = flux_inputs()
    alone = flux(1, 0)
    found: Named = {(FLOOR, ""): Case(nothing, nothing, lambda: alone(**inputs))}
    for case, contender in CONTENDERS.items():
        contender.before()
        for method, order in METHODS.items():
            model = flux(blocks // 3, blocks - blocks // 3)
            enabled(model, order)
            found[case, method] = Case(
                contender.during,
                lambda model=model: cache_dit.refresh_context(model, num_inference_steps=RUN),
                lambda model=model: model(**inputs),
            )
    return found


def enabled(model: Any, order: int) -> None:
    """cache-dit's own call; whatever is in force takes it."""
    import cache_dit

    for name in list(logging.root.manager.loggerDict):
        if name.lower().startswith(("cache_dit", "cache-dit")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        residual_diff_threshold=0.9,
        max_warmup_steps=4,
        enable_separate_cfg=False,
    )
    cache_dit.enable_cache(model, cache_config=config, calibrator_config=calibrator)


REPEAT = 6  # steps of one sample


def measured(found: Named, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of one step of each case in every round: one run of each, of which the quickest stretch counts."""
    clock = common.clock()
    samples: dict[tuple[str, str], list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, (switch, begin, step) in found.items():
            switch()
            begin()
            for _ in range(UNTIMED):
                step()
            quickest = math.inf
            for _ in range((RUN - UNTIMED) // REPEAT):
                start = clock()
                for _ in range(REPEAT):
                    step()
                quickest = min(quickest, (clock() - start) / REPEAT)
            samples[name].append(quickest)
            restore()
    return samples


def counted(
    found: Named, count: Callable[[Callable[[], object]], int]
) -> dict[tuple[str, str], int]:
    """What `count` finds in one step of each case."""
    counts = {}
    for name, (switch, begin, step) in found.items():
        switch()
        begin()
        for _ in range(UNTIMED):
            step()
        counts[name] = count(step)
        restore()
    return counts


def calls(step: Callable[[], object]) -> int:
    """Functions called, those of C included."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(20):
        step()
    profile.disable()
    return round(pstats.Stats(profile).total_calls / 20)


def executed(step: Callable[[], object]) -> int:
    """Instructions of bytecode that the interpreter runs."""
    count = 0

    def note(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        step()
    finally:
        sys.settrace(before)
    return count


def show(rows: list[Row]) -> None:
    table = [
        [r["case"], r["method"], common.spread(r, 1e6, 1), r["functions"], r["instructions"]]
        for r in rows
    ]
    columns = ["case", "method", "us p20 / p50 / p80", "function calls", "instructions"]
    common.print_table(f"{rows[0]['blocks']} blocks of FLUX", columns, table)
    for claim in claims(rows):
        verdict = "met" if claim["met"] else "NOT met"
        print(f"{claim['claim']}: {claim['value']:.3f} (at most {claim['bound']:.3f}) {verdict}")


def claims(rows: list[Row]) -> list[Row]:
    """Own cost of a reused step against cache-dit's."""
    found: list[Row] = []
    units = ("own", "time"), ("functions", "function calls"), ("instructions", "instructions")
    for unit, what in units:
        at = {(r["case"], r["method"]): r[unit] for r in rows}
        floor = at[FLOOR, ""]
        for (case, method), value in at.items():
            if case in (FLOOR, "cache-dit"):
                continue
            bound = CONTENDERS[case].bound
            ratio = (value - floor) / (at["cache-dit", method] - floor)
            claim = f"own {what} of a reused step, {method}, {case} against cache-dit"
            found.append({"claim": claim, "value": ratio, "bound": bound, "met": ratio <= bound})
    return found


if __name__ == "__main__":
    raise SystemExit(main())
