# SPDX-License-Identifier: Apache-2.0
"""Tables of speed and quality on trained models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastcache.configs.presets import presets

from . import quality_claims
from .cells import KEY, frontier
from .common import Row
from .sweeps import ABLATED, INTERVALS, Guide
from .tables import cell, digits, markdown


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
                lead = residual and quality_claims.above_fewer(residual, taylors)
                ahead = "" if lead is None else f"{lead:+.1f}"
                lines.append((taylor["steps"], i, f"{taylor['compute']:.0%}", *psnr, ahead))
    columns = ("steps", "every", "compute (Taylor)", *RIVALS, "residual, equal compute")
    shown = [k for k in range(len(columns)) if any(line[k] for line in lines)]
    kept = [[line[k] for k in shown] for line in lines]
    return markdown([columns[k] for k in shown], kept) if lines else ""


def _ours(rows: Sequence[Row]) -> list[Row]:
    """fastcache's rows that have a result."""
    return [r for r in rows if r["system"] == "fastcache" and not r.get("error")]


SWEPT = ((28, "none"), (28, "sequential"), (50, "none"))  # steps and guidance


def leads(
    rows: Sequence[Row], model: str = "video", swept: Sequence[tuple[int, str]] = SWEPT
) -> str:
    """A model's best of ours at a budget, and how far it is ahead."""
    others = {"diffusers": "diffusers' hooks", "cache-dit": "cache-dit", "uncached": "fewer steps"}
    lines = []
    for n, guidance in swept:
        here = cell(rows, n, guidance, model=model)
        for f in frontier(here) if here else ():
            if f["fastcache"] is not None:
                ahead = [None if f[k] is None else f["fastcache"] - f[k] for k in others]
                cells = ["" if a is None else f"{a:+.1f}" for a in ahead]
                best = (digits(f["fastcache"]), *cells, f["fastcache setting"])
                lines.append((n, guidance, f"{f['budget']:.0%}", *best))
    columns = ("steps", "guidance", "compute at most", "best PSNR")
    columns += (*(f"over {name}" for name in others.values()), "with")
    return markdown(columns, lines) if lines else ""


COMMITTED = ("flux", "video", "dit", "pictures")  # models whose weights are in the repository
SIZES = ("pictures-0.9m", "pictures-2m", "pictures", "pictures-20m")

Named = tuple[str, ...]  # system, method, predictor, setting

# settings that were named before the picture models were measured
NAMED: dict[str, Named] = {
    **{
        f'`preset("{name}")`': ("fastcache", row["what"][0], *row["point"])
        for name, row in presets().items()
        if "point" in row
    },
    # what "balanced" was, and of TaylorSeer's schedule, with the last step and without it
    "0 1 2 5 9 ... 25 27, modulated guide": (
        "fastcache",
        "Guided",
        "modulated guide",
        "every 4, warm-up 2",
    ),
    "0 1 2 4 8 ... 24 27, modulated guide": (
        "fastcache",
        "TaylorSeer",
        "modulated guide",
        "stack, every 4, last 1",
    ),
    "0 1 2 4 8 ... 24, modulated guide": (
        "fastcache",
        "TaylorSeer",
        "modulated guide",
        "stack, every 4",
    ),
    "every 3rd from 1, Taylor 2": ("fastcache", "Interval", "order 2", "every 3, phase 1"),
    "every 4th from 1, Taylor 2": ("fastcache", "Interval", "order 2", "every 4, phase 1"),
    "every 4th, warm-up 4, modulated guide": ("fastcache", "Guided", "modulated guide", "every 4"),
    "the same, order 1": ("fastcache", "Guided", "modulated guide, order 1", "every 4"),
    "gaps up to 4, modulated guide": ("fastcache", "Guided", "modulated guide", "gaps up to 4"),
    "the same, residual guide": ("fastcache", "Guided", "residual guide", "gaps up to 4"),
    "the same, Taylor 1": ("fastcache", "Interval", "order 1", "gaps up to 4"),
    "diffusers' lite mode, every 3rd": ("diffusers", "TaylorSeer", "order 1", "lite, every 3"),
    "diffusers' lite mode, every 4th": ("diffusers", "TaylorSeer", "order 1", "lite, every 4"),
}


def named(rows: Sequence[Row], models: Sequence[str] = COMMITTED) -> str:
    """The same settings on several models, 28 steps: PSNR, and in brackets the lead over fewer steps."""
    return _named(trained(rows, models))


ELSEWHERE = ((28, "batched"), (50, "none"), (50, "sequential"))


def elsewhere(rows: Sequence[Row]) -> str:
    """The same on the picture model with both halves of guidance in one call, and at 50 steps."""
    return _named(elsewhere_cells(rows))


def elsewhere_cells(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by title of the cell."""
    titles = {"none": "no guidance", "sequential": "guidance", "batched": "guidance in one call"}
    return {
        f"{steps} steps, {titles[guidance]}": here
        for steps, guidance in ELSEWHERE
        if (here := cell(rows, steps, guidance, model="pictures"))
    }


def _named(cells: dict[str, list[Row]]) -> str:
    lines = []
    for name, key in NAMED.items():
        found = [next((r for r in here if is_named(r, key)), None) for here in cells.values()]
        if any(found):
            shares = {f"{r['compute']:.0%}" for r in found if r}
            pairs = zip(found, cells.values(), strict=True)
            lines.append(
                (name, " to ".join(sorted(shares)), *(_over(r, here) for r, here in pairs))
            )
    return markdown(("", "compute", *cells), lines) if lines else ""


def trained(
    rows: Sequence[Row], models: Sequence[str] = COMMITTED, steps: int = 28
) -> dict[str, list[Row]]:
    """Rows by trained model and guidance, fp32."""
    return {
        f"{model}, {'guidance' if guidance == 'sequential' else 'no guidance'}": here
        for model in models
        for guidance in ("none", "sequential")
        if (here := cell(rows, steps, guidance, model=model))
    }


def is_named(row: Row, key: Named) -> bool:
    """Whether a row is that setting, and has a result."""
    return tuple(row[k] for k in KEY) == key and row.get("psnr") is not None


def _over(row: Row | None, here: Sequence[Row]) -> str:
    """PSNR of a row, and its lead over fewer steps of its cell."""
    if row is None:
        return ""
    ahead = quality_claims.above_fewer(row, [r for r in here if r["method"] == "fewer steps"])
    return f"{row['psnr']:.1f}" + ("" if ahead is None else f" ({ahead:+.1f})")


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
    """The presets that were measured, at 28 and 50 steps."""
    lines = []
    for name, row in presets().items():
        if "point" not in row:
            continue
        cells = [c for n in (28, 50) for c in _with_lead(rows, n, row["point"])]
        lines.append((f'`preset("{name}")`', *cells))
    columns = ("", "28 steps: compute", "PSNR", "50 steps: compute", "PSNR")
    return markdown(columns, lines)


def _with_lead(rows: Sequence[Row], steps: int, point: list[str]) -> tuple[str, str]:
    """Compute and PSNR of a setting, and in brackets its lead over fewer steps."""
    here = cell(rows, steps)
    found = next((r for r in here if [r["predictor"], r["setting"]] == point), None)
    if found is None:
        return "", ""
    ahead = quality_claims.above_fewer(found, [r for r in here if r["method"] == "fewer steps"])
    lead = "" if ahead is None else f" ({ahead:+.1f})"
    return f"{found['compute']:.0%}", f"{found['psnr']:.1f} dB{lead}"
