# SPDX-License-Identifier: Apache-2.0
"""Python cost of a reused step under cache-dit: its own, with `accelerate()`, and with `install()`.

    python -m bench engines --json out.jsonl

FLUX's own 57 blocks in diffusers' class, of a width that takes no time. cache-dit computes the first of them on
every step, so that its own cost is a step less that of the same model with that block alone, without a cache:
embedders, that block, norms and projection are paid by all sides. Of that own cost the Python part is what is left
without the operators themselves (`engine_operators.py`), which are timed by calling them bare in that place.

Contenders are interleaved in one process, in runs of 50 steps. A sample is the 20th percentile of a run's steps, and
costs are differences of the 20th percentiles of the samples: what the rest of the machine does only ever adds. Of
several processes the medians count. Counted too, since neither depends on that, are calls of functions and the
instructions that the interpreter runs.
"""

from __future__ import annotations

import cProfile
import logging
import pstats
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastcache.integrations import cache_dit as backend
from fastcache.integrations.cache_dit.accelerate import restore

from . import common
from . import engine_operators as operators
from .common import Row
from .overhead import BLOCKS, flux, flux_inputs
from .processes import medians, rows_of
from .systems import missing, quietly

FLOOR = "first block alone"
BARE = "operators of "  # the same, followed by the operators of a contender
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
    operators: Callable[[int], operators.Operators]  # by the order of a forecast


# what is installed stays so: it comes last
CONTENDERS = {
    "cache-dit": Contender(nothing, nothing, 1.0, operators.theirs),
    "accelerate()": Contender(nothing, backend.accelerate, 0.9, operators.accelerated),
    "install()": Contender(backend.install, nothing, 0.3, operators.installed),
}
METHODS = {"reuse": 0, "Taylor 1": 1}


class Case(NamedTuple):
    """What is measured: what is switched on for it, what begins a run, and one step."""

    switch: Callable[[], None]
    begin: Callable[[], object]
    step: Callable[[], object]


def main(argv: list[str] | None = None) -> int:
    p = common.parser("engines", __doc__)
    p.add_argument("--rounds", type=int, help="timed rounds of a process")
    p.add_argument("--processes", type=int, help="whose medians are taken; 1: this one")
    args = p.parse_args(argv)
    if reason := missing("cache-dit") or missing("diffusers"):
        print(reason)
        return 0
    rounds = args.rounds or (2 if args.quick else 20)
    processes = args.processes or (1 if args.quick else 7)
    if processes > 1:
        options = ["--processes", "1", "--rounds", str(rounds), "--threads", str(args.threads)]
        rows = medians(rows_of("engines", processes, options + ["--quick"] * args.quick), MEASURED)
    else:
        torch.set_num_threads(args.threads)
        rows = measured_here(6 if args.quick else BLOCKS, rounds)
    show(rows)
    if args.json:
        common.write_lines(args.json, rows)
    return 0


def measured_here(blocks: int, rounds: int) -> list[Row]:
    """The rows of this process."""
    with torch.no_grad(), quietly():
        found = cases(blocks)
        samples = measured(found, rounds)
        functions, instructions = counted(found, calls), counted(found, executed)
        backend.uninstall()
    environment = common.environment()
    at = {name: common.quantiles(times) for name, times in samples.items()}
    return [
        {"bench": "engines", "case": case, "method": method, "blocks": blocks}
        | at[case, method]
        | costs({name: row["p20"] for name, row in at.items()}, case, method)
        | {
            "functions": functions[case, method],
            "instructions": instructions[case, method],
            "rounds": rounds,
            "calls": RUN - UNTIMED,
        }
        | environment
        for case, method in samples
        if not case.startswith(BARE)
    ]


def costs(at: dict[tuple[str, str], float], case: str, method: str) -> Row:
    """Seconds of a step beyond its model, of the operators in it, and of the Python around them."""
    own = at[case, method] - at[FLOOR, ""]
    if case == FLOOR:
        return {"own": own}
    bare = at[BARE + case, method] - at[BARE + "nobody", ""]
    return {"own": own, "own_operators": bare, "own_python": own - bare}


Named = dict[tuple[str, str], Case]  # by contender and method


def cases(blocks: int) -> Named:
    """Every contender with every method, and the floor."""
    import cache_dit

    inputs = flux_inputs()
    alone = flux(1, 0)
    found: Named = {(FLOOR, ""): Case(nothing, nothing, lambda: alone(**inputs))}
    sequences = {(BARE + "nobody", ""): operators.none} | {
        (BARE + case, method): contender.operators(order)
        for case, contender in CONTENDERS.items()
        for method, order in METHODS.items()
    }
    for name, sequence in sequences.items():
        bare = operators.followed(sequence)
        found[name] = Case(nothing, nothing, lambda bare=bare: bare(**inputs))
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


def measured(found: Named, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of one step of each case in every round: of one run of each."""
    clock = common.clock()
    samples: dict[tuple[str, str], list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, (switch, begin, step) in found.items():
            switch()
            begin()
            for _ in range(UNTIMED):
                step()
            times = []
            for _ in range(RUN - UNTIMED):
                start = clock()
                step()
                times.append(clock() - start)
            samples[name].append(common.quantiles(times)["p20"])
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
        [
            r["case"],
            r["method"],
            common.spread(r, 1e6, 1),
            *(f"{1e6 * r[part]:.1f}" if part in r else "" for part in PARTS),
            r["functions"],
            r["instructions"],
        ]
        for r in rows
    ]
    columns = [
        "case",
        "method",
        "us p20 / p50 / p80",
        *(p.replace("_", " ") for p in PARTS),
        "function calls",
        "instructions",
    ]
    common.print_table(f"{rows[0]['blocks']} blocks of FLUX", columns, table)
    for claim in claims(rows):
        verdict = "met" if claim["met"] else "NOT met"
        print(f"{claim['claim']}: {claim['value']:.3f} (at most {claim['bound']:.3f}) {verdict}")


PARTS = ("own", "own_operators", "own_python")  # of a step's time
MEASURED = ("p20", "p50", "p80", *PARTS)
# what is held against cache-dit's: a field, what it is called, and whether the floor has a share of it
UNITS = (
    ("own", "time", False),
    ("own_python", "Python time", False),
    ("functions", "function calls", True),
    ("instructions", "instructions", True),
)


def claims(rows: list[Row]) -> list[Row]:
    """Own cost of a reused step against cache-dit's."""
    found: list[Row] = []
    by = {(r["case"], r["method"]): r for r in rows}
    for unit, what, floored in UNITS:
        floor = by[FLOOR, ""][unit] if floored else 0.0
        for (case, method), row in by.items():
            if case in (FLOOR, "cache-dit"):
                continue
            bound = CONTENDERS[case].bound
            ratio = (row[unit] - floor) / (by["cache-dit", method][unit] - floor)
            claim = f"own {what} of a reused step, {method}, {case} against cache-dit"
            found.append({"claim": claim, "value": ratio, "bound": bound, "met": ratio <= bound})
    return found


if __name__ == "__main__":
    raise SystemExit(main())
