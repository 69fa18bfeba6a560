"""The number tables inside README.md and docs/*.md, each between two markers:

    <!-- bench:begin NAME -->
    <!-- bench:end -->

`python -m bench report --write` fills them from bench/results, `--check` notices when they are stale.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from fastcache.configs.presets import presets

from . import claims
from . import overhead as python_cost
from .common import Row
from .quality import frontier
from .sweeps import ABLATED, INTERVALS, Guide

MARKED = re.compile(r"(<!-- bench:begin (\w+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)
PICTURE = "bench-frontier-cpu.png"


def fill(text: str, rows: Sequence[Row]) -> str:
    """`text` with every marked table made anew; a KeyError for a name that is not in `SNIPPETS`."""

    def made(found: re.Match[str]) -> str:
        body = SNIPPETS[found[2]](rows) or "No committed results yet."
        return f"{found[1]}{body}\n{found[3]}"

    return MARKED.sub(made, text)


def markdown(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    cells = [["" if c is None else str(c).replace("|", "/") for c in line] for line in lines]
    rule = f"|{'---|' * len(columns)}"
    return "\n".join((f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(c)} |" for c in cells)))


def of(rows: Sequence[Row], bench: str, **fields: object) -> list[Row]:
    """CPU rows of one benchmark with these fields."""
    wanted = {"bench": bench, "kind": "cpu", **fields}
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def cell(
    rows: Sequence[Row],
    steps: int,
    guidance: str = "none",
    model: str = "flux",
    dtype: str = "fp32",
) -> list[Row]:
    """CPU rows of one cell of the quality benchmark."""
    fields = {"steps": steps, "guidance": guidance, "model": model, "dtype": dtype}
    return of(rows, "quality", **fields)


def digits(value: float | None, places: int = 1) -> str:
    return "" if value is None else f"{value:.{places}f}"


# --- quality -----------------------------------------------------------------------------------------


def frontier_short(rows: Sequence[Row]) -> str:
    """The best of every system at a budget."""
    here = cell(rows, 28)
    systems = ("fastcache", "diffusers", "cache-dit", "uncached")
    lines = [(f"{f['budget']:.0%}", *(digits(f[k]) for k in systems)) for f in frontier(here)]
    columns = ("compute at most", "fastcache", "diffusers' hooks", "cache-dit", "fewer steps")
    return markdown(columns, lines) if here else ""


def frontier_settings(rows: Sequence[Row]) -> str:
    """What gives the best PSNR at a budget, for 28 and 50 steps."""
    groups = [cell(rows, n) for n in (28, 50)]
    lines = []
    for here in groups:
        for f in frontier(here) if here else ():
            best = f["fastcache setting"].replace("Guided modulated guide", "guided (modulated)")
            cells = (f"{f['budget']:.0%}", digits(f["fastcache"]), best)
            lines.append((here[0]["steps"], *cells, digits(f["reuse"]), digits(f["uncached"])))
    columns = ("steps", "compute at most", "best PSNR", "with", "best plain reuse", "fewer steps")
    return markdown(columns, lines) if lines else ""


RIVALS = {
    "reuse": ("Interval", "reuse"),
    "Taylor 1": ("Interval", "order 1"),
    "residual guide": ("Guided", "residual guide"),
    "modulated guide": ("Guided", "modulated guide"),
    "modulated, order 1": ("Guided", "modulated guide, order 1"),
    "input guide": ("Guided", "input guide"),
}


def guided(rows: Sequence[Row]) -> str:
    """Reuse, Taylor and the guides on the same schedules, the shipped model."""
    return _schedules([cell(rows, n) for n in (28, 50)])


def video(rows: Sequence[Row]) -> str:
    """The same of the video model."""
    return _schedules([cell(rows, n, model="video") for n in (28, 50)])


def bf16(rows: Sequence[Row]) -> str:
    """The same in bfloat16; after the slash against the uncached run in fp32."""
    here = cell(rows, 28, dtype="bf16")
    whole = [r for r in here if r["method"] == "uncached"]
    table = _schedules([here], lambda r: f"{digits(r['psnr'])} / {digits(r['psnr_fp32'])}")
    found = [
        f"The uncached run in bf16 against that in fp32: {r['psnr_fp32']:.1f} dB." for r in whole
    ]
    return "\n\n".join([*found[:1], table]) if here else ""


def _schedules(
    groups: Sequence[Sequence[Row]], show: Callable[[Row], str] = lambda r: digits(r["psnr"])
) -> str:
    """Predictors on the same schedules; one that a model does not allow gets no column.

    A residual guide runs block 0 on every step: the last column is its lead over Taylor 1 at equal compute.
    """
    lines = []
    for here in groups:
        at = {(r["method"], r["predictor"], r["setting"]): r for r in _ours(here)}
        taylors = [r for n in INTERVALS if (r := at.get((*RIVALS["Taylor 1"], f"every {n}")))]
        for i in INTERVALS:
            found = [at.get((*rival, f"every {i}")) for rival in RIVALS.values()]
            taylor, residual = found[1:3]
            if taylor:
                psnr = ["" if r is None else show(r) for r in found]
                lead = residual and claims.above_fewer(residual, taylors)
                ahead = "" if lead is None else f"{lead:+.1f}"
                lines.append((taylor["steps"], i, f"{taylor['compute']:.0%}", *psnr, ahead))
    columns = ("steps", "every", "compute (Taylor)", *RIVALS, "residual, equal compute")
    shown = [k for k in range(len(columns)) if any(line[k] for line in lines)]
    kept = [[line[k] for k in shown] for line in lines]
    return markdown([columns[k] for k in shown], kept) if lines else ""


def _ours(rows: Sequence[Row]) -> list[Row]:
    """fastcache's rows that have a result."""
    return [r for r in rows if r["system"] == "fastcache" and not r.get("error")]


def leads(rows: Sequence[Row]) -> str:
    """The video model: our best at a budget, and how far it is ahead."""
    others = {"diffusers": "diffusers' hooks", "cache-dit": "cache-dit", "uncached": "fewer steps"}
    lines = []
    for n, guidance in ((28, "none"), (28, "sequential"), (50, "none")):
        here = cell(rows, n, guidance, model="video")
        for f in frontier(here) if here else ():
            if f["fastcache"] is not None:
                ahead = [None if f[k] is None else f["fastcache"] - f[k] for k in others]
                cells = ["" if a is None else f"{a:+.1f}" for a in ahead]
                best = (digits(f["fastcache"]), *cells, f["fastcache setting"])
                lines.append((n, guidance, f"{f['budget']:.0%}", *best))
    columns = ("steps", "guidance", "compute at most", "best PSNR")
    columns += (*(f"over {name}" for name in others.values()), "with")
    return markdown(columns, lines) if lines else ""


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "order 1": {"order": 1},
    "ridge 0": {"ridge": 0.0},
    "ridge 0.03": {"ridge": 0.03},
    "ridge 0.3": {"ridge": 0.3},
    "every token in the guide": {"tokens": 1},
    "warm-up 1": {"warmup": 1},
    "warm-up 2": {"warmup": 2},
    "last step not computed": {"last": 0},
    "last two steps computed": {"last": 2},
}


def ablation(rows: Sequence[Row]) -> str:
    """One setting of `Guided` or of its schedule changed at a time, both models, 28 steps."""
    lines = []
    for model in ("flux", "video"):
        here = cell(rows, 28, model=model)
        at = {(r["predictor"], r["setting"]): r for r in _ours(here) if r["method"] == "Guided"}
        for name, fields in VARIANTS.items():
            guides = [Guide(g, **fields) for g in ("residual", "modulated")]
            found = [at.get((g.label, f"every {n}{g.setting}")) for g in guides for n in ABLATED]
            if any(found):
                share = found[1]
                compute = "" if share is None else f"{share['compute']:.0%}"
                lines.append((model, name, compute, *(digits(r and r["psnr"]) for r in found)))
    at_each = [f"{g}, every {n}" for g in ("residual", "modulated") for n in ABLATED]
    columns = ("model", "changed", f"compute (residual, every {ABLATED[1]})", *at_each)
    return markdown(columns, lines) if lines else ""


def budgets(rows: Sequence[Row]) -> str:
    """The presets that were measured, the guided one with both guides, at 28 and 50 steps."""
    lines = []
    for name, row in presets().items():
        if "point" not in row:
            continue
        points = {f'`preset("{name}")`': row["point"]}
        if row["what"][0] == "Guided":
            other = ["modulated guide", row["point"][1]]
            points[f'`preset("{name}", guide="modulated")`'] = other
        for call, point in points.items():
            cells = [c for n in (28, 50) for c in _with_lead(rows, n, point)]
            lines.append((call, *cells))
    columns = ("", "28 steps: compute", "PSNR", "50 steps: compute", "PSNR")
    return markdown(columns, lines)


def _with_lead(rows: Sequence[Row], steps: int, point: list[str]) -> tuple[str, str]:
    """Compute and PSNR of a setting, and in brackets its lead over fewer steps."""
    here = cell(rows, steps)
    found = next((r for r in here if [r["predictor"], r["setting"]] == point), None)
    if found is None:
        return "", ""
    ahead = claims.above_fewer(found, [r for r in here if r["method"] == "fewer steps"])
    lead = "" if ahead is None else f" ({ahead:+.1f})"
    return f"{found['compute']:.0%}", f"{found['psnr']:.1f} dB{lead}"


# --- speed -------------------------------------------------------------------------------------------

KERNELS = (
    ("first-block change and store", "residual_l1 + store", "FLUX"),
    ("first-block change and store", "residual_l1 + store", "CogVideoX"),
    ("weighted sum of 3 (Taylor)", "linear_combine of 3", "FLUX"),
    ("weighted sum of 3 (Taylor)", "linear_combine of 3", "CogVideoX"),
    ("apply a residual", "residual_apply", "FLUX"),
)


def kernels(rows: Sequence[Row]) -> str:
    """C++ kernels against diffusers' eager chains and torch.compile, fp32 and bf16."""
    lines = []
    for name, op, model in KERNELS:
        cells: dict[str, list[str]] = {"diffusers": [], "compile": [], "copy": []}
        here = of(rows, "ops", op=op, model=model)
        for dtype in ("fp32", "bf16"):
            cell = {r["contender"]: r for r in here if r["dtype"] == dtype}
            if "C++" not in cell:
                continue
            ours = cell["C++"]
            compiled = [cell[c]["p50"] for c in ("compile", "compile out=") if c in cell]
            if "diffusers" in cell:
                cells["diffusers"].append(f"{cell['diffusers']['p50'] / ours['p50']:.1f}×")
            if compiled:
                cells["compile"].append(f"{min(compiled) / ours['p50']:.2f}×")
            cells["copy"].append(f"{ours['of_copy']:.0%}")
        if here:
            shape = "×".join(map(str, here[0]["shape"]))
            lines.append((name, shape, *(" / ".join(c) for c in cells.values())))
    columns = ("op", "shape", "against diffusers", "against torch.compile", "of a copy's bandwidth")
    return markdown(columns, lines) if lines else ""


def overhead(rows: Sequence[Row]) -> str:
    """Python cost of a skipped step, as a share of diffusers' hooks."""
    here = of(rows, "overhead")
    value = {c["claim"]: f"{c['value']:.2f}×" for c in python_cost.claims(here)}
    cases = {r["case"]: r["p50"] for r in here}
    lines = []
    for method in ("MagCache", "FirstBlock"):
        ours, theirs = cases.get(f"{method}, fastcache"), cases.get(f"{method}, diffusers")
        if ours and theirs:
            lines.append((f"{method}, 57 trivial blocks, eager", f"{ours / theirs:.2f}×"))
    for want in python_cost.WANT:
        if want.floors and want.claim in value:
            kind, how = (
                "FLUX's 57" if "FLUX" in want.ours else "57 trivial",
                want.ours.split(", ")[-1],
            )
            lines.append((f"MagCache, {kind} blocks, `{how}`, own cost", value[want.claim]))
    return (
        markdown(("a skipped step", "Python time against diffusers' hooks, eager"), lines)
        if lines
        else ""
    )


def steps(rows: Sequence[Row]) -> str:
    """Reused steps and whole runs against both peers, trained model, eager."""
    here = of(rows, "steps", model="digits", compiled="")
    at = {(r["system"], r["method"], r["batch"]): r for r in here}
    batches = sorted({r["batch"] for r in here})
    lines = []
    for method in dict.fromkeys(r["method"] for r in here if r["system"] == "fastcache"):
        for peer in ("diffusers", "cache-dit"):
            sides = ("fastcache", peer)
            pairs = {b: [at.get((s, method, b)) for s in sides] for b in batches}
            known = {b: (ours, other) for b, (ours, other) in pairs.items() if ours and other}
            if not known:
                continue
            times = [
                " / ".join(f"{ours[k] / other[k]:.2f}×" for ours, other in known.values())
                for k in ("reused_ms", "run_p50")
            ]
            counted = known.get(8, next(iter(known.values())))
            counts = [
                " / ".join(f"{r[k] / unit:.0f}" for r in counted if r.get(k) is not None)
                for k, unit in (("launches", 1), ("cache_bytes", 1024))
            ]
            lines.append((method, peer, *times, *counts))
    names = " / ".join(map(str, batches))
    columns = ("method", "against", f"reused step, batch {names}", f"whole run, batch {names}")
    columns += ("launches, ours / theirs", "cache KiB, ours / theirs")
    return markdown(columns, lines) if lines else ""


def graphs(rows: Sequence[Row]) -> str:
    """Means, and in brackets the most, under torch.compile by system and entry."""
    here = [r for r in of(rows, "graphs", backend="capture") if r["system"] != "uncached"]
    lines = []
    for key in dict.fromkeys((r["system"], r["entry"]) for r in here):
        mine = [r for r in here if (r["system"], r["entry"]) == key]
        ran = [r for r in mine if "error" not in r]
        counts = [[r[k] for r in ran] for k in ("graphs", "breaks", "recompiles")]
        most = [f"{statistics.mean(c):.1f} ({max(c)})" if any(c) else "0" for c in counts]
        full = sum(r["fullgraph"] == "yes" for r in ran)
        tried = f"{len(ran)} of {len(mine)}"
        lines.append((key[0], f"`{key[1]}`", tried, *most, f"{full} of {len(ran)}"))
    columns = ("", "compiled by", "models × methods that ran")
    columns += ("graphs", "breaks", "recompiles", "fullgraph")
    return markdown(columns, lines) if lines else ""


# --- promises ----------------------------------------------------------------------------------------


def promises(rows: Sequence[Row]) -> str:
    """How many are met, and the others by name."""
    found = claims.all_claims(rows)
    unmet = [c for c in found if not c.met]
    text = f"{len(found) - len(unmet)} of {len(found)} promises are met by the committed results."
    if unmet:
        lines = [(c.text, c.found, c.bound) for c in unmet]
        text += " Not met:\n\n" + markdown(("promise", "measured", "bound"), lines)
    return text


SNIPPETS: dict[str, Callable[[Sequence[Row]], str]] = {
    "frontier": frontier_short,
    "settings": frontier_settings,
    "guided": guided,
    "ablation": ablation,
    "video": video,
    "leads": leads,
    "bf16": bf16,
    "presets": budgets,
    "kernels": kernels,
    "overhead": overhead,
    "steps": steps,
    "graphs": graphs,
    "promises": promises,
}
