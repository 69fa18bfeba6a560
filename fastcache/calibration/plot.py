# SPDX-License-Identifier: Apache-2.0
"""Pictures of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..reporting.figure import COLOURS, GRID, INK, ROWS, new_figure, save_figure, tidy_axes
from .thresholds import Rows, first_block_share, mag_share

Ratios = tuple[float, ...]


def plot_calibration(
    path: str | Path,
    title: str,
    steps: int,
    mean: Ratios,
    contexts: Mapping[str, Ratios],
    first_block: Mapping[str, Rows],
) -> Path:
    """Draw ratios, first-block changes and the share of steps that a threshold computes.

    steps: denoiser calls of a run. mean, contexts: magnitude ratios, over all contexts and by context.
    first_block: changes of the first block's residual by context.
    """
    figure = new_figure(13, 3.9)
    axes = figure.subplots(1, 3 if first_block else 2)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, color=INK)
    _draw_ratios(axes[0], mean, contexts)
    if first_block:
        _draw_changes(axes[1], first_block)
    _draw_shares(axes[-1], steps, mean, first_block)
    return save_figure(figure, path)


def _draw_ratios(axes: Any, mean: Ratios, contexts: Mapping[str, Ratios]) -> None:
    for (name, ratios), colour in zip(contexts.items(), COLOURS * ROWS, strict=False):
        axes.plot(range(1, len(ratios)), ratios[1:], "o-", ms=3, lw=1.2, color=colour, label=name)
    axes.plot(range(1, len(mean)), mean[1:], color=INK, lw=2, alpha=0.8, label="mean")
    axes.axhline(1.0, color=GRID, lw=1, zorder=0)
    axes.set(xlabel="step", ylabel="|residual| / |residual before|")
    axes.set_title("MagCache's ratios", fontsize=10.5, loc="left", color=INK)
    axes.legend(frameon=False, fontsize=9)
    tidy_axes(axes)


def _draw_changes(axes: Any, first_block: Mapping[str, Rows]) -> None:
    for (name, rows), colour in zip(first_block.items(), COLOURS * ROWS, strict=False):
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


def _draw_shares(axes: Any, steps: int, mean: Ratios, first_block: Mapping[str, Rows]) -> None:
    grid = [0.005 * i for i in range(1, 121)]
    plain = {"warmup": 0, "max_skips": 0, "last": False}
    curves = [("MagCache", "-", [mag_share(mean, steps, t) for t in grid])]
    if first_block:
        guarded = {"warmup": 4, "max_skips": 0, "last": True}
        for label, style, guards in (
            ("FirstBlock", "-", plain),
            ("FirstBlock, guards of a forecast", "--", guarded),
        ):
            shares = [first_block_share(first_block.values(), t, **guards) for t in grid]
            curves.append((label, style, shares))
    for (label, style, shares), colour in zip(curves, (COLOURS[1], *COLOURS[:1] * 2), strict=False):
        axes.plot(grid, [100 * s for s in shares], style, color=colour, lw=1.7, label=label)
    axes.set(xlabel="threshold", ylabel="steps computed, %", ylim=(0, 102), xlim=(0, grid[-1]))
    axes.set_title("what a threshold computes", fontsize=10.5, loc="left", color=INK)
    axes.legend(frameon=False, fontsize=9)
    tidy_axes(axes)
