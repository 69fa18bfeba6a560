# SPDX-License-Identifier: Apache-2.0
"""Tables and the picture of `bench tune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .common import Row
from .figures import COLOURS, GREY, new
from .subjects import NAMES
from .tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOLVERS = {"euler": "Euler", "ab2": "AB2", "unipc": "UniPC", "dpm++2m": "DPM-Solver++ 2M"}
CACHED = ("euler", "ab2")


def of_part(rows: Sequence[Row], part: str, model: str | None = None) -> list[Row]:
    return [
        r
        for r in rows
        if r.get("bench") == "tune" and r["part"] == part and model in (None, r["model"])
    ]


def cached(rows: Sequence[Row], solver: str, most: float) -> Row | None:
    """The nearest cached row of a solver that computes at most so many steps."""
    within = [r for r in rows if r["recipe"] and r["solver"] == solver and r["computed"] <= most]
    return max(within, key=lambda r: r["psnr"], default=None)


def curve_of(rows: Sequence[Row], model: str = "flux", guidance: str = "none") -> list[Row]:
    """Rows of one curve; older ones leave out that they were made without guidance."""
    return [r for r in of_part(rows, "curve", model) if r.get("guidance", "none") == guidance]


def more_steps(rows: Sequence[Row], model: str = "flux", guidance: str = "none") -> str:
    """PSNR to the converged run, by computed steps."""
    here = curve_of(rows, model, guidance)
    counts = sorted({r["computed"] for r in here if not r["recipe"]})
    lines = []
    for n in counts:
        plain = {r["solver"]: r["psnr"] for r in here if not r["recipe"] and r["computed"] == n}
        found = [cached(here, s, n) if n < counts[-1] else None for s in CACHED]
        cells = [
            "" if r is None else f"**{r['psnr']:.1f}**" if r["psnr"] > max(plain.values()) else f"{r['psnr']:.1f}"
            for r in found
        ]  # fmt: skip
        lines.append((str(n), *(f"{plain[s]:.1f}" for s in SOLVERS), *cells))
    lengths = " or ".join(str(n) for n in sorted({r["steps"] for r in here if r["recipe"]}))
    columns = ("computed", *SOLVERS.values())
    columns += tuple(f"{lengths} steps, {SOLVERS[s]}, cached" for s in CACHED)
    return markdown(columns, lines) if lines else ""


def tuned(rows: Sequence[Row]) -> str:
    """What tune found at twice the speed, beside solvers at that time."""
    lines = []
    for r in of_part(rows, "solvers"):
        others = ", ".join(f"{SOLVERS[s]} {p:.1f}" for s, p in r["at_that_time"].items())
        found = f"{r['found']}, {r['computed']:.0f} of {r['steps']}"
        lead = r["psnr"] - r["usual"]
        ahead = r["psnr"] - max(r["at_that_time"].values())
        lines.append(
            (
                NAMES[r["model"]], SOLVERS[r["solver"]], found, f"{r['speedup']:.2f}x", f"{r['psnr']:.1f}",
                f"{r['usual']:.1f} ({lead:+.1f})", f"{others} ({ahead:+.1f})",
            )
        )  # fmt: skip
    columns = (
        "model",
        "loop",
        "found",
        "speed-up",
        "PSNR",
        "28 Euler steps",
        "that many steps without a cache",
    )
    return markdown(columns, lines) if lines else ""


def against_sweep(rows: Sequence[Row]) -> str:
    """What tune found at a speed-up, beside the best of the sweep."""
    lines = [
        (
            NAMES[r["model"]], f"{r['speedup']:g}", f"{r['psnr']:.1f}", f"{r['best_psnr']:.1f}",
            f"{r['psnr'] - r['best_psnr']:+.1f}", f"{r['unseen']:.1f}", f"{r['best_unseen']:.1f}",
            f"{r['seconds'] / r['sweep_seconds']:.0%}",
        )
        for r in of_part(rows, "sweep")
    ]  # fmt: skip
    columns = (
        "model",
        "speed-up",
        "tune",
        "sweep",
        "lead",
        "tune, unseen",
        "sweep, unseen",
        "time of the sweep's",
    )
    return markdown(columns, lines) if lines else ""


def plans(rows: Sequence[Row]) -> str:
    """Plans of one calibrated run, beside evenly spread steps."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for r in of_part(rows, "plans"):
        found.setdefault((r["model"], r["predictor"], r["computed"]), {})[r["way"]] = r["psnr"]
    ways = ("even", "steps", "final", "run")
    lines = [
        (
            NAMES[model], predictor, str(computed),
            *(f"**{p[w]:.1f}**" if p[w] == max(p.values()) else f"{p[w]:.1f}" for w in ways),
        )
        for (model, predictor, computed), p in found.items()
    ]  # fmt: skip
    return markdown(("model", "predictor", "computed", *ways), lines) if lines else ""


def more_steps_figure(rows: Sequence[Row]) -> Figure:
    """PSNR to the converged run over computed steps: solvers, and 50 cached steps."""
    here = curve_of(rows)
    figure, axes = new(width=8.4, height=4.6)
    plot: Any = axes[0][0]
    shades = {
        "euler": GREY,
        "ab2": "#616e7c",
        "unipc": COLOURS["diffusers"],
        "dpm++2m": COLOURS["cache-dit"],
    }
    for solver, colour in shades.items():
        part = [r for r in here if not r["recipe"] and r["solver"] == solver]
        plot.plot([r["computed"] for r in part], [r["psnr"] for r in part], "o-", ms=3.5, lw=1.2, color=colour,
                  label=f"{SOLVERS[solver]}, no cache")  # fmt: skip
    counts = sorted({r["computed"] for r in here if r["recipe"]})
    for solver, style in (("ab2", "o-"), ("euler", "o--")):
        found = [cached(here, solver, n) for n in counts]
        points = {r["computed"]: r["psnr"] for r in found if r is not None}
        plot.plot(list(points), list(points.values()), style, ms=5, lw=2, color=COLOURS["fastcache"],
                  label=f"50 steps, {SOLVERS[solver]}, cached")  # fmt: skip
    usual = next(
        (r["psnr"] for r in here if (r["solver"], r["steps"], r["recipe"]) == ("euler", 28, "")),
        None,
    )
    if usual is not None:
        plot.axhline(usual, color=GREY, lw=1, ls=":", label="28 Euler steps")
    plot.set_xlabel("full evaluations of the blocks")
    plot.set_ylabel("PSNR to the converged picture, dB")
    plot.grid(alpha=0.25)
    plot.legend(frameon=False, fontsize=8.5, loc="upper left", ncol=2)
    low, high = plot.get_ylim()
    plot.set_ylim(low, high + 4)
    return figure
