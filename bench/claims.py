# SPDX-License-Identifier: Apache-2.0
"""What the project promises, checked against committed results: one row per promise, met or not."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence

from . import method_tables, overhead
from .catalogue import FROZEN
from .claim import Claim, at_least
from .common import Row
from .contenders import PASSES
from .quality_claims import quality

GRAPH_LIMITS = {"FirstBlockCache": 3, "MagCache": 2, "TaylorSeer": 2, "PAB": 2, "FasterCache": 4}


def all_claims(rows: Sequence[Row]) -> list[Claim]:
    """Those for which there are results."""
    by_bench: dict[str, list[Row]] = {}
    for row in rows:
        by_bench.setdefault(row["bench"], []).append(row)
    makers = {
        "quality": quality,
        "methods": method_tables.claims,
        "steps": steps,
        "graphs": graphs,
        "ops": ops,
        "overhead": python_cost,
    }
    return [c for name, make in makers.items() if name in by_bench for c in make(by_bench[name])]


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
    decision, predict, signal = "residual_l1 + store", "linear_combine of 3", "modulated_l1 + store"
    for op, chain, model, dtype, bound in (
        (decision, "diffusers", "CogVideoX", "fp32", 5),
        (decision, "diffusers", "CogVideoX", "bf16", 10),
        (decision, "diffusers", "FLUX", "fp32", 4),
        (decision, "diffusers", "FLUX", "bf16", 4),
        (signal, "TeaCache", "FLUX", "fp32", 4),
        (signal, "TeaCache", "FLUX", "bf16", 4),
    ):
        value = _faster(_cell(rows, op, model, dtype), "C++", chain)
        if value is not None:
            shape = next(r["shape"] for r in rows if r["model"] == model)
            whose = f"{chain}'" if chain.endswith("s") else f"{chain}'s"
            text = f"C++ {op} over {whose} eager chain, {shape[0]}×{shape[1]} {dtype}"
            yield at_least("kernels", text, value, bound)
    found = [_faster(cell, "C++", "diffusers") for _, cell in _cells(rows, predict)]
    values = [v for v in found if v is not None]
    if values:
        text = f"C++ {predict} over diffusers' Taylor chain, median over shapes and dtypes"
        yield at_least("kernels", text, statistics.median(values), 8)
    for op in (decision, predict, signal):
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
