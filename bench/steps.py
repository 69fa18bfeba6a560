# SPDX-License-Identifier: Apache-2.0
"""Latency and memory of computed and reused steps: fastcache, diffusers' hooks and cache-dit.

    python -m bench steps --json out.jsonl

All systems follow one schedule: the first 4 of 28 steps computed, then every third (methods on modules
come as near as their fields allow, alike on both sides). Only cost is
compared; weights may be random. "own" is a reused step less the modules that must still run: in every
round the same model without its skipped blocks runs right before, and the two are subtracted step by
step, each side as it is in its quiet rounds. What the first block takes, eagerly on a CPU, is taken off
either first. "passes alone" is that model with the arithmetic of a reused step written into it, and
nothing that decides or keeps books: no cache can cost less.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch

from . import common, systems
from .catalogue import contenders
from .common import Row
from .contenders import FLOORS, INSIDE, METHODS, STEPS, WARMUP, Contender, idle, own_plan, timestep
from .models import MODELS, Subject
from .traffic import Live, Traffic

BATCHES = (1, 8, 64)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    for package in ("diffusers", "cache-dit"):
        if reason := systems.missing(package):
            print(reason)
    if systems.missing("diffusers"):
        print("the models are diffusers' own classes: nothing can be measured")
        return 0
    if args.quick:
        args.batch, args.rounds, args.steps = [1], 1, 10
    environment = common.environment(args.device)
    rows = common.read_lines(args.json) if args.resume else []
    have = {(r["model"], r["batch"], bool(r["compiled"])) for r in rows}
    for batch in args.batch:
        subject = MODELS[args.model](batch, args.steps, args.tokens, args.device)
        if (subject.name, batch, args.mode == "compiled") in have:
            continue
        rows += [{**row, **environment} for row in measure(subject, args)]
        if args.json:
            common.write_lines(args.json, rows)
    show(rows)
    if args.plot:
        from .figures import save, steps_figure

        save(steps_figure(rows), args.plot)
    return 0


def measure(subject: Subject, args: Any) -> list[Row]:
    """Interleaved runs of every contender; per-step medians."""
    sync = torch.cuda.synchronize if args.device == "cuda" else idle
    found: list[Contender] = []
    start = time.perf_counter()

    def late(share: float) -> bool:
        return time.perf_counter() - start > share * args.budget

    blocks = type(getattr(subject.model, subject.lists[0])[0])
    # what is compiled cannot be timed from within, nor what is only launched
    apart = INSIDE(blocks) if (args.mode, args.device) == ("eager", "cpu") else nullcontext()
    with systems.quietly(), torch.no_grad(), apart:
        for contender in contenders(subject, args.mode):
            if contender.system != "uncached" and contender.method not in args.method:
                continue
            if late(0.7):
                print(f"out of time before {contender.system} {contender.method}")
                break
            try:
                if not contender.compiled and args.device == "cpu":
                    with Live() as live:
                        contender.run(subject, sync)
                    contender.peak = live.peak
                for _ in range(args.warmup):  # also where compilation happens
                    contender.run(subject, sync)
            except Exception as error:
                print(f"{contender.system} {contender.method} {contender.compiled}: {error}"[:300])
                continue
            contender.times.clear()
            found.append(contender)
        floors = {(c.kept, bool(c.compiled)): c for c in found if c.method in FLOORS.values()}
        with common.bar(args.rounds * len(found), f"{subject.name}, batch {subject.batch}") as bar:
            for index in range(args.rounds):
                if index and late(1.0):
                    break
                turn = index % len(found)  # so that no contender is always late in a round
                for contender in found[turn:] + found[:turn]:
                    bar.set_postfix_str(f"{contender.system} {contender.method}")
                    if floor := floors.get((contender.kept, bool(contender.compiled))):
                        contender.above(floor, subject, sync)
                    else:
                        contender.run(subject, sync)
                    bar.update()
        return [_row(contender, subject, args) for contender in found]


def _row(contender: Contender, subject: Subject, args: Any) -> Row:
    plan = own_plan(contender.method, len(subject.calls))
    cached = contender.attached is not None
    skips = cached or contender.force is not None
    by_kind: dict[bool, list[float]] = {True: [], False: []}
    for times in contender.times:
        for compute, t in zip(plan, times, strict=True):
            by_kind[compute or not skips].append(t)
    row: Row = {"bench": "steps", "model": subject.name, "batch": subject.batch}
    row |= {"system": contender.system, "method": contender.method}
    row |= {"compiled": contender.compiled, "steps": len(plan), "computed": sum(plan)}
    runs = [sum(times) for times in contender.times]
    row |= {f"run_{k}": v for k, v in common.quantiles(runs).items()}
    row |= {"rounds": len(runs), "runs": [round(t, 6) for t in runs]}
    row["computed_ms"] = 1e3 * common.quantiles(by_kind[True])["p50"]
    row["reused_ms"] = 1e3 * common.quantiles(by_kind[False])["p50"] if skips else None
    if contender.pairs:
        row |= {f"own_{k}": 1e3 * v for k, v in common.quantiles(contender.own()).items()}
        row["own_ms"] = row.pop("own_p50")
    if cached and not contender.compiled:
        row |= _traffic(contender, subject)
    if contender.peak is not None:
        row["peak_bytes"] = contender.peak
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.run(subject, torch.cuda.synchronize)
        contender.times.pop()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return row


def _traffic(contender: Contender, subject: Subject) -> Row:
    """Launches, device reads, new tensors and cache bytes, of the first reused step past the warm-up."""
    plan, attached = own_plan(contender.method, len(subject.calls)), contender.attached
    assert attached is not None
    row: Row = {}
    for i, inputs in enumerate(subject.calls):
        systems.CLOCK["t"] = t = timestep(i, len(plan))
        if contender.force is not None:
            contender.force(plan[i])
        watched = i > WARMUP and not plan[i]
        with (
            attached.context("cond", i, len(plan), t),
            Traffic(subject.hidden_bytes // 2) if watched else nullcontext() as traffic,
        ):
            contender.call(**inputs)
        if watched:
            # reading two sums with `tolist` is no op that a dispatch mode could see
            hidden = int(contender.system == "fastcache" and contender.method == "FirstBlock")
            row = {"launches": traffic.launches, "reads": traffic.reads + hidden}
            row |= {"temporaries": traffic.temporaries, "cache_bytes": attached.nbytes()}
            break
    attached.reset()
    return row


def show(rows: list[Row]) -> None:
    for model, batch in dict.fromkeys((r["model"], r["batch"]) for r in rows):
        here = [r for r in rows if (r["model"], r["batch"]) == (model, batch)]
        table = [
            [r["method"], r["system"], r["compiled"]]
            + [_ms(r.get(k)) for k in ("computed_ms", "reused_ms", "own_ms")]
            + [common.spread({p: r[f"run_{p}"] for p in ("p20", "p50", "p80")}, 1e3, 1)]
            + [r.get("launches"), r.get("reads"), _kib(r.get("temporaries"))]
            + [_kib(r.get("cache_bytes")), _kib(r.get("peak_bytes"))]
            for r in sorted(here, key=lambda r: (r["compiled"], r["method"]))
        ]
        columns = ["method", "system", "compiled", "computed ms", "reused ms", "own ms"]
        columns += ["run ms p20/p50/p80", "launches", "reads", "new KiB", "cache KiB", "peak KiB"]
        common.print_table(f"{model}, batch {batch}", columns, table)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _kib(value: int | None) -> str:
    return "" if value is None else f"{value / 1024:.0f}"


def _parser() -> Any:
    p = common.parser("steps", __doc__)
    p.add_argument("--model", choices=MODELS, default="digits")
    p.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    p.add_argument("--tokens", type=int, default=1024, help="image tokens of the random models")
    p.add_argument("--steps", type=int, default=STEPS)
    p.add_argument("--method", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    p.add_argument("--warmup", type=int, default=2, help="runs of each before the rounds")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument(
        "--mode",
        choices=("eager", "compiled", "both"),
        default="eager",
        help="compiled: under Inductor, which takes minutes",
    )
    p.add_argument("--budget", type=float, default=3600.0, help="seconds per model and batch")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
