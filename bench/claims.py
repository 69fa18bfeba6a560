"""What the project promises, checked against committed results: one row per promise, met or not."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import overhead
from .catalogue import FROZEN
from .common import Row
from .contenders import PASSES
from .quality import cells, frontier
from .sweeps import ABLATED, AFTER_THREE, INTERVALS, RIDGE

# Guided prediction over Taylor 1: by steps of a run, the intervals and dB that are promised
GUIDED_GAINS = {28: ((3, 4, 5), 2.0), 50: ((5, 7), 3.0)}
PROMISED_STEPS = (28, 50)  # of the shipped model in fp32
GRAPH_LIMITS = {"FirstBlockCache": 3, "MagCache": 2, "TaylorSeer": 2, "PAB": 2, "FasterCache": 4}


@dataclass(frozen=True)
class Claim:
    """A promise, the number found and its bound."""

    area: str
    text: str
    found: str
    bound: str
    met: bool


def all_claims(rows: Sequence[Row]) -> list[Claim]:
    """Those for which there are results."""
    by_bench: dict[str, list[Row]] = {}
    for row in rows:
        by_bench.setdefault(row["bench"], []).append(row)
    makers = {
        "quality": quality,
        "steps": steps,
        "graphs": graphs,
        "ops": ops,
        "overhead": python_cost,
    }
    return [c for name, make in makers.items() if name in by_bench for c in make(by_bench[name])]


def at_least(area: str, text: str, value: float, bound: float, unit: str = "×") -> Claim:
    return Claim(
        area, text, f"{value:.2f}{unit}", f"at least {bound:g}{unit}", value >= bound - 1e-9
    )


# --- ops ---------------------------------------------------------------------------------------------


def ops(rows: Sequence[Row]) -> Iterator[Claim]:
    for device in dict.fromkeys(r["kind"] for r in rows):
        here = [r for r in rows if r["kind"] == device]
        yield from _cpu(here) if device == "cpu" else _gpu(here)


def _cell(rows: Sequence[Row], op: str, model: str, dtype: str) -> dict[str, Row]:
    """The contenders of one cell."""
    return {
        r["contender"]: r for r in rows if (r["op"], r["model"], r["dtype"]) == (op, model, dtype)
    }


def _cells(rows: Sequence[Row], op: str | None = None) -> Iterator[tuple[str, dict[str, Row]]]:
    keys = dict.fromkeys((r["op"], r["model"], r["dtype"]) for r in rows)
    for key in keys:
        if op is None or key[0] == op:
            yield " ".join(key), _cell(rows, *key)


def _faster(cell: dict[str, Row], ours: str, *others: str) -> float | None:
    """How many times faster `ours` is than the fastest of `others`."""
    times = [cell[o]["p50"] for o in others if o in cell]
    return min(times) / cell[ours]["p50"] if times and ours in cell else None


def _cpu(rows: Sequence[Row]) -> Iterator[Claim]:
    decision, predict = "residual_l1 + store", "linear_combine of 3"
    for model, dtype, bound in (
        ("CogVideoX", "fp32", 5),
        ("CogVideoX", "bf16", 10),
        ("FLUX", "fp32", 4),
        ("FLUX", "bf16", 4),
    ):
        value = _faster(_cell(rows, decision, model, dtype), "C++", "diffusers")
        if value is not None:
            shape = next(r["shape"] for r in rows if r["model"] == model)
            text = f"C++ {decision} over diffusers' eager chain, {shape[0]}×{shape[1]} {dtype}"
            yield at_least("kernels", text, value, bound)
    found = [_faster(cell, "C++", "diffusers") for _, cell in _cells(rows, predict)]
    values = [v for v in found if v is not None]
    if values:
        text = f"C++ {predict} over diffusers' Taylor chain, median over shapes and dtypes"
        yield at_least("kernels", text, statistics.median(values), 8)
    for op in (decision, predict):
        values = []
        for _, cell in _cells(rows, op):
            ratio = _faster(cell, "C++", "compile", "compile out=")
            values += [] if ratio is None else [ratio]
        if values:
            text = f"C++ {op} over the faster torch.compile form, median over shapes and dtypes"
            yield at_least("kernels", text, statistics.median(values), 1)
    for op in (decision, predict):
        shares = [
            100 * cell["C++"]["of_copy"]
            for name, cell in _cells(rows, op)
            if name.endswith("fp32") and "C++" in cell
        ]
        if shares:
            text = f"C++ {op}, share of the copy bandwidth, fp32, lowest over shapes"
            yield at_least("kernels", text, min(shares), 80, " %")


def _gpu(rows: Sequence[Row]) -> Iterator[Claim]:
    for label in ("Triton", "CUDA"):
        cells = [(name, cell) for name, cell in _cells(rows) if label in cell]
        if cells:
            name, share = min(
                ((n, 100 * c[label]["of_copy"]) for n, c in cells), key=lambda item: item[1]
            )
            text = f"{label}, share of the copy bandwidth, lowest over all cells ({name})"
            yield at_least("kernels", text, share, 90, " %")
        ratios = [(n, _faster(c, label, "compile", "compile out=")) for n, c in cells]
        known = [(n, v) for n, v in ratios if v is not None]
        if known:
            name, value = min(known, key=lambda item: item[1])
            text = f"{label} over the faster torch.compile form, lowest over all cells ({name})"
            yield at_least("kernels", text, value, 1)


# --- Python and graphs -----------------------------------------------------------------------------------


def python_cost(rows: Sequence[Row]) -> Iterator[Claim]:
    for c in overhead.claims(list(rows)):
        yield Claim(
            "Python cost", c["claim"], f"{c['value']:.3f}×", f"at most {c['bound']:g}×", c["met"]
        )


def graphs(rows: Sequence[Row]) -> Iterator[Claim]:
    mine = [r for r in rows if r["system"] == "fastcache" and r["backend"] == "capture"]
    alone = [r for r in mine if r["entry"] == "fastcache.compile(model)"]
    models = len({r["model"] for r in mine})
    if not alone:
        return
    breaks = sum(r.get("breaks", 1) for r in mine)
    text = f"graph breaks over {len(mine)} combinations on {models} models"
    yield Claim("torch.compile", text, str(breaks), "0", breaks == 0)
    again = sum(r.get("recompiles", 1) for r in alone)
    text = f"recompiles under fastcache.compile, {alone[0]['runs']} runs and two contexts"
    yield Claim("torch.compile", text, str(again), "0", again == 0)
    full = sum(r["fullgraph"] == "yes" for r in mine)
    yield Claim(
        "torch.compile",
        "combinations that compile with fullgraph=True",
        f"{full} of {len(mine)}",
        "all",
        full == len(mine),
    )
    over = [r for r in alone if r.get("graphs", 99) > GRAPH_LIMITS[r["method"]]]
    limits = ", ".join(f"{m} {n}" for m, n in GRAPH_LIMITS.items())
    most = ", ".join(
        f"{m} {max(r.get('graphs', 99) for r in alone if r['method'] == m)}"
        for m in GRAPH_LIMITS
        if any(r["method"] == m for r in alone)
    )
    yield Claim("torch.compile", "graphs per method, at most", most, limits, not over)
    under = [r for r in rows if r["system"] == "fastcache" and r["backend"] == "inductor"]
    for here, name, bound in ((mine, "in captured graphs", 0), (under, "under Inductor", 1e-5)):
        if here:
            text = (
                f"largest difference to the same method in eager, {name}, {len(here)} combinations"
            )
            apart = max(r.get("difference", 1.0) for r in here)
            yield Claim("torch.compile", text, f"{apart:.1e}", f"at most {bound:g}", apart <= bound)


# --- steps -----------------------------------------------------------------------------------------------


def steps(rows: Sequence[Row]) -> Iterator[Claim]:
    here = [r for r in rows if r["model"] == "digits" and r["batch"] == 8]
    at = {(r["system"], r["method"], r["compiled"]): r for r in here}
    for method, (ours, theirs) in itertools.product(
        ("MagCache", "FirstBlock"), (("", ""), (FROZEN, "torch.compile"))
    ):
        for peer in ("diffusers", "cache-dit"):
            mine, other = at.get(("fastcache", method, ours)), at.get((peer, method, theirs))
            if mine and other and mine.get("own_ms") is not None and other.get("own_ms"):
                how = f", {ours}" * bool(ours)
                text = f"own cost of a reused step, {method}{how}, batch 8, against {peer}"
                found = f"{mine['own_ms'] / other['own_ms']:.2f}×"
                if (least := at.get((PASSES, method, ours))) and "own_ms" in least:
                    found += f", the arithmetic alone {least['own_ms'] / other['own_ms']:.2f}×"
                met = mine["own_ms"] <= 0.5 * other["own_ms"]
                yield Claim("steps", text, found, "at most 0.5×", met)
    slower = []
    for (system, method, compiled), row in at.items():
        mine = at.get(("fastcache", method, ""))
        if system in ("diffusers", "cache-dit") and not compiled and mine:
            slower.append((mine["run_p20"] / row["run_p20"], f"{method} against {system}"))
    if slower:
        ratio, name = max(slower)
        text = f"whole runs at the same schedule, quiet rounds, batch 8, the worst ratio ({name})"
        # what two timings of one contender differ by on this machine
        yield Claim("steps", text, f"{ratio:.2f}×", "at most 1.03×", ratio <= 1.03)
    graphs = [r for r in here if r["compiled"] and r["system"] in ("diffusers", "cache-dit")]
    mine = [r for r in here if r["compiled"] and r["system"] == "fastcache"]
    if graphs and mine:
        best = min(r["run_p50"] for r in graphs)
        value = best / min(r["run_p50"] for r in mine)
        text = "compiled runs, batch 8, over the best compiled peer"
        yield at_least("steps", text, value, 1.15)
    for method in dict.fromkeys(r["method"] for r in here):
        ours = at.get(("fastcache", method, ""), {}).get("peak_bytes")
        peaks = {
            p: at.get((p, method, ""), {}).get("peak_bytes") for p in ("diffusers", "cache-dit")
        }
        ratios = {p: ours / peak for p, peak in peaks.items() if ours and peak}
        if ratios:
            peer = max(ratios, key=ratios.__getitem__)
            text = f"peak memory of a run from nothing, {method}, batch 8, against {peer}"
            found = f"{ratios[peer]:.3f}×"
            yield Claim("steps", text, found, "at most 1×", ratios[peer] <= 1)
    seer = at.get(("diffusers", "TaylorSeer", ""))
    stack = at.get(("fastcache", "Taylor on the stack", ""))
    if seer and stack and seer.get("cache_bytes"):
        ratio = stack["cache_bytes"] / seer["cache_bytes"]
        text = "cache bytes of Taylor on the stack, against diffusers' TaylorSeer default"
        yield Claim("steps", text, f"{ratio:.3f}×", "at most 0.1×", ratio <= 0.1)


# --- quality ---------------------------------------------------------------------------------------------


def quality(rows: Sequence[Row]) -> Iterator[Claim]:
    for cell, here in cells(rows):
        if (cell.model, cell.dtype) != ("flux", "fp32") or cell.steps not in PROMISED_STEPS:
            continue  # measured and shown, and nothing was promised
        if cell.guidance != "batched":  # swept for the guidance half alone
            yield from _frontier(here, cell.title)
        if cell.guidance == "none":
            yield from _guided(here, cell.steps, cell.title)
            yield from _forecasts(here, cell.title)
        yield from _seer(here, cell.title)
        yield from _broadcast(here, cell.title)


def _pick(rows: Sequence[Row], *key: str) -> Row | None:
    """The measured row of this key."""
    names = ("system", "method", "predictor", "setting")
    found = (r for r in rows if tuple(r[k] for k in names) == key)
    return next((r for r in found if r.get("psnr") is not None), None)


def _forecasts(rows: Sequence[Row], where: str) -> Iterator[Claim]:
    """Order 1 against reuse where both computed the same, and against fewer steps."""
    fewer = [r for r in rows if r["method"] == "fewer steps"]
    for method in ("FirstBlock", "MagCache"):
        gains = []
        for row in rows:
            key = (row["system"], row["method"], row["predictor"])
            if key != ("fastcache", method, "reuse") or row.get("psnr") is None:
                continue
            other = _pick(rows, "fastcache", method, "order 1", row["setting"])
            if other is None or abs(other["compute"] - row["compute"]) > 0.02:
                continue
            ahead = above_fewer(other, fewer)
            if ahead is not None and ahead > 0:
                gains.append((other["psnr"] - row["psnr"], row["setting"]))
        gains.sort(reverse=True)
        if len(gains) > 1:
            best = ", ".join(f"{g:.1f} dB at {s}" for g, s in gains[:2])
            text = f"{method}: order 1 over reuse on the same decisions, second best, {where}"
            value = gains[1][0]
            yield Claim("quality", text, best, "at least 5 dB at two", value >= 5)


def above_fewer(row: Row, fewer: Sequence[Row]) -> float | None:
    """dB above the uncached model at fewer steps and the same compute, interpolated."""
    points = sorted((r["compute"], r["psnr"]) for r in fewer if r.get("psnr") is not None)
    for (c0, p0), (c1, p1) in itertools.pairwise(points):
        if c0 <= row["compute"] <= c1:
            return row["psnr"] - (p0 + (p1 - p0) * (row["compute"] - c0) / (c1 - c0))
    return None


def _guided(rows: Sequence[Row], n: int, where: str) -> Iterator[Claim]:
    """Guided prediction against Taylor 1 on the same schedules, and what thinning the guide costs."""

    def psnr(method: str, predictor: str, setting: str) -> float | None:
        row = _pick(rows, "fastcache", method, predictor, setting)
        return row["psnr"] if row else None

    def gains(guide: str, intervals: Sequence[int], schedule: str, more: str = "") -> list[float]:
        pairs = [
            (
                psnr("Guided", f"{guide} guide", f"every {i}{schedule}{more}"),
                psnr("Interval", "order 1", f"every {i}{schedule}"),
            )
            for i in intervals
        ]
        return [ours - taylor for ours, taylor in pairs if ours is not None and taylor is not None]

    intervals, bound = GUIDED_GAINS.get(n, ((), 0.0))
    names = ", ".join(map(str, intervals))
    for schedule, first in ((AFTER_THREE, 3), ("", 4)):
        found = gains("residual", intervals, schedule)
        if found and len(found) == len(intervals):
            text = (
                f"residual guide, order 2, over Taylor 1 at the same computed steps, {first} first, then every "
                f"{names}, {where}"
            )
            shown = ", ".join(f"{g:.1f}" for g in found) + " dB"
            yield Claim("guided", text, shown, f"each at least {bound:g} dB", min(found) >= bound)
        for more in ("", f", ridge {RIDGE:g}"):
            found = gains("modulated", INTERVALS, schedule, more)
            if found:
                over = f"modulated guide{more}, over Taylor 1 at equal compute, {first} first steps"
                text = f"{over}, median of {len(found)} intervals, {where}"
                yield at_least("guided", text, statistics.median(found), 1, " dB")
                text = f"{over}, lowest of {len(found)} intervals, {where}"
                yield at_least("guided", text, min(found), -0.5, " dB")
    costs = [
        whole - thin
        for i in ABLATED
        for guide in ("residual guide", "modulated guide")
        if (whole := psnr("Guided", guide, f"every {i}, all tokens")) is not None
        if (thin := psnr("Guided", guide, f"every {i}")) is not None
    ]
    if costs:
        text = f"largest cost of keeping every 4th token of the guide, {len(costs)} cells, {where}"
        yield Claim("guided", text, f"{max(costs):.2f} dB", "at most 0.6 dB", max(costs) <= 0.6)
    guided = _pick(rows, "fastcache", "Guided", "modulated guide", "every 3")
    taylor = _pick(rows, "fastcache", "Interval", "order 2", "every 3")
    if guided and taylor:
        share = guided["cache_bytes"] / taylor["cache_bytes"] - 1
        text = f"bytes of the guides, against those of the residuals, {where}"
        # a handful of weights comes on top
        yield Claim("guided", text, f"{share:.3f}×", "at most 0.25×", share <= 0.255)


def _seer(rows: Sequence[Row], where: str) -> Iterator[Claim]:
    """Forecasts of the whole stack against upstream's forecast of the last projection's output."""
    lite = _pick(rows, "diffusers", "TaylorSeer", "order 1", "lite, every 4")
    taylor = _pick(rows, "fastcache", "TaylorSeer", "order 1", "stack, every 4")
    guided = _pick(rows, "fastcache", "TaylorSeer", "modulated guide", "stack, every 4")
    if lite and taylor:
        text = f"Taylor 1 on the stack over upstream's lite mode, every 4, same computed steps, {where}"
        lead = taylor["psnr"] - lite["psnr"]
        found = f"{lead:.2f} dB"
        if guided:
            found += f" (guided: {guided['psnr'] - lite['psnr']:.2f} dB)"
        yield Claim("quality", text, found, "at least 0.5 dB", lead >= 0.5)
    early = _pick(rows, "fastcache", "Interval", "order 1", "every 4, early start")
    if lite and early and abs(early["compute"] - lite["compute"]) < 1e-3:
        text = f"Taylor 1 on the stack over upstream's lite mode, every 4, as many computed steps, {where}"
        yield at_least("quality", text, early["psnr"] - lite["psnr"], 0.5, " dB")


def _broadcast(rows: Sequence[Row], where: str) -> Iterator[Claim]:
    if not rows or rows[0]["guidance"] != "sequential":
        return
    ours = _pick(rows, "fastcache", "PAB", "reuse", "range 2")
    theirs = _pick(rows, "diffusers", "PAB", "reuse", "range 2")
    if ours and theirs:
        text = f"PAB over upstream's, range 2, {where}"
        yield at_least("quality", text, ours["psnr"] - theirs["psnr"], 15, " dB")


def _frontier(rows: Sequence[Row], where: str) -> Iterator[Claim]:
    """The smallest lead over all compute budgets at which both sides have a point."""
    lines = frontier(rows)
    for other, bound, name in (
        ("diffusers", 1, "the best of diffusers' methods"),
        ("cache-dit", 1, "the best of cache-dit"),
        ("reuse", 4, "the best of our rules with plain reuse"),
        ("uncached", 3, "fewer steps"),
    ):
        leads = [
            (line["fastcache"] - line[other], line["budget"])
            for line in lines
            if line["fastcache"] is not None and line[other] is not None
        ]
        if leads:
            lead, budget = min(leads)
            text = f"best recipe over {name}, the smallest lead of 25 to 60 % compute, {where}"
            found = f"{lead:.1f} dB at {budget:.0%}"
            yield Claim("frontier", text, found, f"at least {bound} dB", lead >= bound)
