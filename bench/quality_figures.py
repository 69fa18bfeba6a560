# SPDX-License-Identifier: Apache-2.0
"""Pictures of speed and quality on trained models."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cells import cells
from .figures import INK, Row, new
from .sweeps import AFTER_THREE, INTERVALS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def best_line(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper envelope of (percent, dB): points that no cheaper one beats, by more than half a percent."""
    line: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (round(2 * p[0]), -p[1])):
        if not line or y > line[-1][1]:
            line.append((x, y))
    return line


@dataclass(frozen=True)
class Series:
    """One line of the quality pictures: what belongs to it and how it looks."""

    label: str
    colour: str
    holds: Callable[[Row], bool]
    style: str = "-"
    width: float = 1.5
    marker: str = "o"


def _on_stack(r: Row) -> bool:
    """fastcache, every block skipped at once."""
    setting = str(r["setting"])
    alone = r["method"] in ("FirstBlock", "MagCache", "Interval", "Mask") or setting.startswith(
        "stack"
    )
    return r["system"] == "fastcache" and alone


SERIES = (
    Series(
        "fastcache, guided",
        "#1d4f91",
        lambda r: r["system"] == "fastcache" and "guide" in r["predictor"],
        width=2.6,
    ),
    Series(
        "fastcache, Taylor",
        "#5f9bd8",
        lambda r: _on_stack(r) and r["predictor"].startswith("order"),
        width=1.8,
    ),
    Series(
        "fastcache, plain reuse", "#9dbfe2", lambda r: _on_stack(r) and r["predictor"] == "reuse"
    ),
    Series("diffusers' hooks", "#d9822b", lambda r: r["system"] == "diffusers", marker="s"),
    Series("cache-dit", "#b85c9e", lambda r: r["system"] == "cache-dit", marker="^"),
    Series(
        "fewer steps, no cache",
        INK,
        lambda r: r["method"] == "fewer steps",
        style="--",
        width=1.3,
        marker="x",
    ),
)


SHOWN = (0.15, 0.8)  # shares of compute that the pictures show


def quality_figure(rows: Sequence[Row]) -> Figure:
    """PSNR against compute, a panel per cell that was swept; lines join what no cheaper setting beats."""
    every = list(cells(rows))
    swept = [
        (cell, here) for cell, here in every if any(r["method"] == "fewer steps" for r in here)
    ]
    panels = swept or every
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = new(lines, columns, 6.4 * columns, 0.5 + 4.2 * lines)
    for axis, (cell, here) in zip(axes.flat, panels, strict=False):
        _frontier(axis, here)
        seeds = statistics.mode(r["seeds"] for r in here)  # of nearly all; some rows have others
        axis.set_title(f"{cell.title}, {seeds} seeds", loc="left")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    known = dict(pair for axis in axes.flat for pair in _named_lines(axis))
    labels = [series.label for series in SERIES if series.label in known]
    handles = [known[label] for label in labels]
    figure.legend(handles, labels, loc="outside upper center", ncol=3 * columns, frameon=False)
    return figure


def _named_lines(axis: Any) -> list[tuple[str, Any]]:
    """(label, line) of a panel."""
    handles, labels = axis.get_legend_handles_labels()
    return list(zip(labels, handles, strict=True))


def frontier_figure(rows: Sequence[Row]) -> Figure:
    """The same for one steps and guidance, lines named where they are."""
    figure, axes = new(1, 1, 8.6, 5.0)
    axis = axes[0][0]
    _frontier(axis, rows)
    axis.legend(frameon=False, loc="upper left", fontsize=10)
    figure.suptitle(
        f"How close to the uncached images: {rows[0]['seeds']} images of the shipped model, "
        f"{rows[0]['steps']} steps",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
    )
    above = axis.secondary_xaxis("top", functions=(_inverse, _inverse))
    above.set_xticks(
        [1.25, 1.5, 2, 2.5, 3, 4, 5], ["1.25×", "1.5×", "2×", "2.5×", "3×", "4×", "5×"]
    )
    above.set_xlabel("less compute", fontsize=8.5)
    return figure


def _inverse(percent: Any) -> Any:
    """Percent of the compute as a factor, and back."""
    import numpy as np

    return 100 / np.maximum(percent, 1e-9)


def _frontier(axis: Any, rows: Sequence[Row]) -> None:
    known = [r for r in rows if r.get("psnr") is not None and SHOWN[0] <= r["compute"] <= SHOWN[1]]
    for series in SERIES:
        dots = [(100 * r["compute"], r["psnr"]) for r in known if series.holds(r)]
        if not dots:
            continue
        seen = sorted({(round(x, 1), round(y, 1)) for x, y in dots})  # one dot where they coincide
        axis.scatter(*zip(*seen, strict=True), s=14, marker=series.marker, color=series.colour,
                     alpha=0.35, linewidths=1.0 if series.marker == "x" else 0)  # fmt: skip
        axis.plot(
            *zip(*best_line(dots), strict=True),
            color=series.colour,
            lw=series.width,
            ls=series.style,
            marker=series.marker,
            ms=4.5,
            label=series.label,
            zorder=3 if series.label.endswith("guided") else 2,
        )
    axis.set_xlabel("compute of the transformer, % of the uncached run")
    axis.set_ylabel("PSNR against the uncached run, dB")
    axis.grid(alpha=0.25)


GUIDES = {"residual": "#1d4f91", "modulated": "#3a8f5c", "input": "#b8860b"}


def _gains(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """(interval, dB over Taylor 1) of each guide, on the schedule it was first measured on, where there is one."""
    at = {
        (r["predictor"], r["setting"]): r["psnr"]
        for r in rows
        if r["system"] == "fastcache" and r["method"] in ("Guided", "Interval")
    }
    gains = {}
    for guide in GUIDES:
        for schedule in (AFTER_THREE, ""):
            pairs = [
                (n, at.get((f"{guide} guide", setting)), at.get(("order 1", setting)))
                for n in INTERVALS
                if (setting := f"every {n}{schedule}")
            ]
            dots = [(n, a - b) for n, a, b in pairs if a is not None and b is not None]
            if dots:
                gains[guide] = dots
                break
    return gains


def guided_figure(rows: Sequence[Row]) -> Figure:
    """dB that each guide brings over Taylor 1 on the same schedule, by interval; a panel per cell that has any."""
    panels = [(cell, gains) for cell, here in cells(rows) if (gains := _gains(here))]
    columns = max(1, min(3, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure, axes = new(lines, columns, 4.9 * columns, 3.6 * lines)
    for axis, (cell, gains) in zip(axes.flat, panels, strict=False):
        for guide, dots in gains.items():
            axis.plot(*zip(*dots, strict=True), "o-", color=GUIDES[guide], ms=4.5, lw=1.8,
                      label=f"{guide} guide")  # fmt: skip
        axis.axhline(0, color=INK, lw=1)
        axis.set_title(cell.title, loc="left")
        axis.set_xlabel("every how many-th step is computed")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("dB above Taylor of order 1,\nsame computed steps")
    axes[0][0].legend(frameon=False)
    return figure
