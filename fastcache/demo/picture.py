# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: samples, amplified difference, computed steps and the frontier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .methods import REUSE
from .rows import reference_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

    from .rows import Row, Run

SHOWN = 10
GAIN = 8
INK = "#1f2933"
COLOURS = {
    "uncached": INK,
    "fewer steps": "#8a94a3",
    "FirstBlock": "#2f6db3",
    "MagCache": "#c8553d",
    "Interval": "#3a8f5c",
}
# families that later rows bring
SPARE_COLOURS = ("#8458b3", "#b8860b", "#20808d", "#a03b6b")


def draw(runs: list[Run], rows: list[Row], curve: dict[int, float], path: Path) -> None:
    """Write the picture of `runs` to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = _colours(rows)
    shown = [(run, row) for run, row in zip(runs, rows, strict=True) if run.method.pictured]
    figure = plt.figure(figsize=(13, 0.62 * len(shown) + 6.4), facecolor="white")
    parts = figure.add_gridspec(
        2,
        1,
        height_ratios=[0.62 * len(shown), 4.6],
        hspace=0.16,
        left=0.155,
        right=0.975,
        top=0.955,
        bottom=0.065,
    )
    _draw_samples(figure, parts[0], shown, runs, colours)
    below = parts[1].subgridspec(1, 2, width_ratios=[1.0, 1.15], wspace=0.24)
    # methods that skip attention inside running blocks have no place on a scale of blocks
    on_scale = [
        row
        for row in rows
        if row.guidance is None and (row.compute < 1 or row.family == "uncached")
    ]
    _draw_strip(figure.add_subplot(below[0]), on_scale, colours)
    _draw_frontier(figure.add_subplot(below[1]), on_scale, curve, colours)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _colours(rows: list[Row]) -> dict[str, str]:
    families = dict.fromkeys(row.family for row in rows)
    unknown = [name for name in families if name not in COLOURS]
    spare = {name: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, name in enumerate(unknown)}
    return COLOURS | spare


def _draw_samples(
    figure: Figure,
    part: SubplotSpec,
    shown: list[tuple[Run, Row]],
    runs: list[Run],
    colours: dict[str, str],
) -> None:
    """One line per method: the first ten images, and their difference to the uncached ones."""
    grid = part.subgridspec(len(shown), 2, wspace=0.03, hspace=0.06)
    for line, (run, row) in enumerate(shown):
        samples, difference = figure.add_subplot(grid[line, 0]), figure.add_subplot(grid[line, 1])
        images = _montage(run.images)
        change = images - _montage(reference_of(run, runs).images)
        samples.imshow(images, cmap="gray", vmin=-1, vmax=1, aspect="auto")
        difference.imshow(GAIN * change, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for axes in (samples, difference):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        note = "reference" if row.psnr is None else f"{row.psnr:.1f} dB, {row.speedup:.1f}x"
        samples.text(
            -0.015,
            0.68,
            _label(row),
            transform=samples.transAxes,
            ha="right",
            va="center",
            fontsize=10,
            color=colours[row.family],
            weight="bold",
        )
        samples.text(
            -0.015,
            0.3,
            note,
            transform=samples.transAxes,
            ha="right",
            va="center",
            fontsize=8.5,
            color=INK,
        )
        if line == 0:
            samples.set_title("same noise, same labels", fontsize=10.5, color=INK)
            difference.set_title(
                f"difference to uncached, {GAIN} times amplified", fontsize=10.5, color=INK
            )


def _label(row: Row) -> str:
    return f"{row.name}, {row.predictor}" if row.predictor else row.name


def _montage(images: Tensor) -> np.ndarray:
    """[B, 1, 16, 16] -> the first images side by side, [16, 16 * SHOWN]."""
    return np.concatenate(list(images[:SHOWN, 0].numpy()), axis=1)


def _draw_strip(axes: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    """A cell per step: full height where all blocks ran, a sliver where only some did."""
    full = max(rows[0].blocks)
    for line, row in enumerate(rows):
        width = rows[0].steps / row.steps
        heights = [0.78 * n / max(full, max(row.blocks)) for n in row.blocks]
        left = [i * width for i in range(row.steps)]
        bottom = line + 0.39
        axes.bar(
            left,
            [-h for h in heights],
            width * 0.86,
            bottom=bottom,
            align="edge",
            color=colours[row.family],
            lw=0,
        )
        axes.text(
            rows[0].steps + 0.4, line, f"{row.compute:.0%}", va="center", fontsize=8, color=INK
        )
    axes.set(
        ylim=(len(rows) - 0.4, -0.6),
        xlim=(0, rows[0].steps),
        yticks=range(len(rows)),
        xlabel="denoising, from noise to image",
    )
    axes.set_yticklabels([_label(row) for row in rows], fontsize=8.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("blocks computed at each step", fontsize=10.5, color=INK)


def _crowded(row: Row, rows: list[Row]) -> bool:
    """Whether a label to the right of `row`'s point would run into another point."""
    return any(
        0 < other.compute - row.compute < 0.2 and abs(other.psnr - row.psnr) < 2.5
        for other in rows
        if other.psnr is not None and row.psnr is not None
    )


def _draw_frontier(
    axes: Axes, rows: list[Row], curve: dict[int, float], colours: dict[str, str]
) -> None:
    """PSNR over compute; up and to the left is better, the line is what fewer steps give."""
    total = rows[0].steps
    axes.plot(
        [100 * n / total for n in curve],
        list(curve.values()),
        color=colours["fewer steps"],
        lw=1.6,
        ls="--",
        zorder=1,
    )
    reused = {row.name: row for row in rows if row.predictor == REUSE}
    for row in rows:
        if row.psnr is None:
            continue
        colour = colours[row.family]
        at = (100 * row.compute, row.psnr)
        axes.scatter(
            *at,
            s=64,
            zorder=3,
            linewidth=1.6,
            edgecolor=colour,
            facecolor="white" if row.predictor == REUSE else colour,
        )
        start = reused.get(row.name)
        if start is not None and start is not row:
            axes.annotate(
                "",
                at,
                (100 * start.compute, start.psnr),
                arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 5, "shrinkB": 5},
            )
        if row.predictor != REUSE:
            left = _crowded(row, rows)
            axes.annotate(
                row.name,
                at,
                textcoords="offset points",
                xytext=(-8 if left else 8, -3),
                ha="right" if left else "left",
                fontsize=8.5,
                color=colour,
            )
    axes.set(xlabel="blocks computed, % of uncached", ylabel="PSNR to uncached, dB")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("open: reuse, filled: prediction, dashed: fewer steps", fontsize=10.5, color=INK)
