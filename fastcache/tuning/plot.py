# SPDX-License-Identifier: Apache-2.0
"""A picture of what a tuning has tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..reporting.figure import COLOURS, INK, new_figure, save_figure
from .rows import Row, frontier


def plot_rows(rows: Sequence[Row], wish: str, path: str | Path) -> Path:
    """PSNR over speed-up: cached runs, their frontier, runs without a cache, and the best.

    rows: the best first. Raises ImportError without matplotlib.
    """
    figure = new_figure(8.6, 4.8)
    axes = figure.subplots()
    cached = [r for r in rows if r.recipe is not None and math.isfinite(r.psnr)]
    plain = sorted(
        (r for r in rows if r.recipe is None and math.isfinite(r.psnr)), key=lambda r: r.speedup
    )
    widest = max((len(r.seeds) for r in rows), default=0)
    for judged, alpha in ((False, 0.35), (True, 0.9)):
        some = [r for r in cached if (len(r.seeds) == widest) == judged]
        label = f"judged on {widest} seeds" if judged else "tried"
        axes.scatter([r.speedup for r in some], [r.psnr for r in some], s=16, alpha=alpha, color=COLOURS[0],
                     linewidths=0, label=label if some else None)  # fmt: skip
    best = frontier(cached)
    axes.plot([r.speedup for r in best], [r.psnr for r in best], color=COLOURS[0], lw=1.2)
    if plain:
        axes.plot([r.speedup for r in plain], [r.psnr for r in plain], "o-", color=COLOURS[1], lw=1.4,
                  ms=4, label="other step counts, no cache")  # fmt: skip
    if rows and math.isfinite(rows[0].psnr):
        axes.scatter([rows[0].speedup], [rows[0].psnr], s=110, marker="*", color=COLOURS[2],
                     zorder=5, label=rows[0].name)  # fmt: skip
    axes.set_xlabel("times as fast as the uncached run")
    axes.set_ylabel("PSNR to the reference, dB")
    axes.set_title(wish, loc="left", fontsize=11, color=INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if rows:
        axes.legend(frameon=False, fontsize=8.5)
    return save_figure(figure, path)
