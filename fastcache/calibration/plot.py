"""Pictures of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting.figure import COLOURS, GRID, INK, ROWS, new_figure, save_figure, tidy_axes

if TYPE_CHECKING:
    from .calibration import Calibration


def plot_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Draw the ratios, the first-block changes and the share of steps that a threshold computes."""
    figure = new_figure(13, 3.9)
    axes = figure.subplots(1, 3 if calibration.first_block else 2)
    title = f"calibration of {calibration.model or 'a model'}, {calibration.steps} steps"
    if calibration.scheduler:
        title += f", {calibration.scheduler}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, color=INK)
    _draw_ratios(axes[0], calibration)
    if calibration.first_block:
        _draw_changes(axes[1], calibration)
    _draw_shares(axes[-1], calibration)
    return save_figure(figure, path)


def _draw_ratios(axes: Any, calibration: Calibration) -> None:
    for (name, ratios), colour in zip(calibration.contexts.items(), COLOURS * ROWS, strict=False):
        axes.plot(range(1, len(ratios)), ratios[1:], "o-", ms=3, lw=1.2, color=colour, label=name)
    mean = calibration.mag_ratios
    axes.plot(range(1, len(mean)), mean[1:], color=INK, lw=2, alpha=0.8, label="mean")
    axes.axhline(1.0, color=GRID, lw=1, zorder=0)
    axes.set(xlabel="step", ylabel="|residual| / |residual before|")
    axes.set_title("MagCache's ratios", fontsize=10.5, loc="left", color=INK)
    axes.legend(frameon=False, fontsize=9)
    tidy_axes(axes)


def _draw_changes(axes: Any, calibration: Calibration) -> None:
    for (name, rows), colour in zip(calibration.first_block.items(), COLOURS * ROWS, strict=False):
        for gap, width in ((1, 1.8), (2, 1.1), (4, 0.7)):
            steps = [i for i, row in enumerate(rows) if len(row) >= gap and row[gap - 1] < 1e29]
            label = name if gap == 1 else None
            values = [rows[i][gap - 1] for i in steps]
            axes.plot(steps, values, color=colour, lw=width, alpha=1.2 - 0.2 * gap, label=label)
    axes.set(xlabel="step", ylabel="relative L1 change")
    axes.set_ylim(bottom=0)
    axes.set_title(
        "first block, against 1 (bold), 2 and 4 steps before", fontsize=10.5, loc="left", color=INK
    )
    axes.legend(frameon=False, fontsize=9)
    tidy_axes(axes)


def _draw_shares(axes: Any, calibration: Calibration) -> None:
    grid = [0.005 * i for i in range(1, 121)]
    plain = {"warmup": 0, "max_skips": 0, "last": False}
    curves = [("MagCache", "-", [calibration.mag_share(t) for t in grid])]
    if calibration.first_block:
        guarded = {"warmup": 4, "max_skips": 0, "last": True}
        for label, style, guards in (
            ("FirstBlock", "-", plain),
            ("FirstBlock, guards of a forecast", "--", guarded),
        ):
            shares = [calibration.first_block_share(t, **guards) for t in grid]
            curves.append((label, style, shares))
    for (label, style, shares), colour in zip(curves, (COLOURS[1], *COLOURS[:1] * 2), strict=False):
        axes.plot(grid, [100 * s for s in shares], style, color=colour, lw=1.7, label=label)
    axes.set(xlabel="threshold", ylabel="steps computed, %", ylim=(0, 102), xlim=(0, grid[-1]))
    axes.set_title("what a threshold computes", fontsize=10.5, loc="left", color=INK)
    axes.legend(frameon=False, fontsize=9)
    tidy_axes(axes)
