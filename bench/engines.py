# SPDX-License-Identifier: Apache-2.0
"""Python cost of a reused step under cache-dit: its own, with `accelerate()`, and with `install()`.

    python -m bench engines --json out.jsonl

FLUX's own 57 blocks in diffusers' class, of a width that takes no time. cache-dit computes the first of them on
every step, so that its own cost is a step less that of the same model with that block alone. Contenders are
interleaved in one process; read the ratios. Calls of Python functions are counted too: they do not depend on what else
the machine does.
"""

from __future__ import annotations

import cProfile
import logging
import pstats
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastcache.integrations import cache_dit as backend
from fastcache.integrations.cache_dit.accelerate import restore

from . import common
from .common import Row
from .overhead import BLOCKS, flux, flux_inputs
from .systems import missing, quietly

FLOOR = "first block alone"


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


def main(argv: list[str] | None = None) -> int:
    p = common.parser("engines", __doc__)
    p.add_argument("--rounds", type=int, help="timed rounds")
    args = p.parse_args(argv)
    if reason := missing("cache-dit") or missing("diffusers"):
        print(reason)
        return 0
    torch.set_num_threads(args.threads)
    blocks = 6 if args.quick else BLOCKS
    rounds, repeat = args.rounds or (2 if args.quick else 40), 3 if args.quick else 10
    with torch.no_grad(), quietly():
        found = cases(blocks)
        samples, functions = measured(found, rounds, repeat), counted(found)
        backend.uninstall()
    environment = common.environment()
    rows: list[Row] = [
        {"bench": "engines", "case": case, "method": method, "blocks": blocks}
        | common.quantiles(times)
        | {"functions": functions[case, method], "rounds": rounds, "calls": repeat}
        | environment
        for (case, method), times in samples.items()
    ]
    show(rows)
    if args.json:
        common.write_lines(args.json, rows)
    return 0


Case = tuple[str, str]


def cases(blocks: int) -> dict[Case, tuple[Callable[[], None], Callable[[], object]]]:
    """What is switched on for a case, and one step of it."""
    inputs = flux_inputs()
    alone = flux(1, 0)
    found: dict[Case, Any] = {(FLOOR, ""): (nothing, lambda: alone(**inputs))}
    for case, contender in CONTENDERS.items():
        contender.before()
        for method, order in METHODS.items():
            model = flux(blocks // 3, blocks - blocks // 3)
            enabled(model, order)
            found[case, method] = (contender.during, lambda model=model: model(**inputs))
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


def measured(found: dict[Case, Any], rounds: int, repeat: int) -> dict[Case, list[float]]:
    """Seconds of one step of each case, in interleaved rounds.

    What is switched on changes classes, after which the interpreter has to specialize its bytecode anew: calls
    that are not timed come first.
    """
    clock = common.clock()
    samples: dict[Case, list[float]] = {case: [] for case in found}
    for _ in range(rounds):
        for case, (switch, run) in found.items():
            switch()
            for _ in range(20):
                run()
            for _ in range(5):
                begin = clock()
                for _ in range(repeat):
                    run()
                samples[case].append((clock() - begin) / repeat)
            restore()
    return samples


def counted(found: dict[Case, Any], steps: int = 50) -> dict[Case, int]:
    """Calls of Python functions in one step of each case."""
    counts = {}
    for case, (switch, run) in found.items():
        switch()
        run()
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(steps):
            run()
        profile.disable()
        counts[case] = round(pstats.Stats(profile).total_calls / steps)
        restore()
    return counts


def show(rows: list[Row]) -> None:
    table = [[r["case"], r["method"], common.spread(r, 1e6, 1), r["functions"]] for r in rows]
    columns = ["case", "method", "us p20 / p50 / p80", "function calls"]
    common.print_table(f"{rows[0]['blocks']} blocks of FLUX", columns, table)
    for claim in claims(rows):
        verdict = "met" if claim["met"] else "NOT met"
        print(f"{claim['claim']}: {claim['value']:.3f} (at most {claim['bound']:.3f}) {verdict}")


def claims(rows: list[Row]) -> list[Row]:
    """Own cost of a reused step against cache-dit's."""
    found: list[Row] = []
    for unit, what in (("p50", "time"), ("functions", "function calls")):
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
