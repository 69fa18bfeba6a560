# SPDX-License-Identifier: Apache-2.0
"""Table and picture of how the picture models were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .common import Row
from .figures import new
from .tables import markdown, of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TONES = ("#d9822b", "#9dbfe2", "#2f6db3", "#16324f")


def losses(rows: Sequence[Row]) -> str:
    """Held-out loss by size: at the last step that all sizes have seen, at its best, and at the end."""
    here = [r for r in of(rows, "training") if r["history"]["held_out"]]
    if not here:
        return ""
    curves = [dict(r["history"]["held_out"]) for r in here]
    common_step = max(set.intersection(*(set(c) for c in curves)))
    lines = []
    for row, curve in zip(here, curves, strict=True):
        best = min(curve, key=lambda step: curve[step])
        lines.append(
            (
                row["size"], f"{row['parameters']:,}", f"{row['steps']:,}", f"{curve[common_step]:.3f}",
                f"{curve[best]:.3f} (step {best:,})", f"{row['held_out_loss']:.3f}",
                f"{row['train_loss_on_as_many']:.3f}",
            )
        )  # fmt: skip
    columns = ("size", "parameters", "steps", f"held out, step {common_step:,}", "best, two draws")
    columns += ("at the end, eight draws", "as many pictures of the training")
    return markdown(columns, lines)


def students(rows: Sequence[Row]) -> str:
    """How near students and their teachers come to the teacher's long guided run, by steps and calls of the model."""
    lines = []
    for row in of(rows, "distilling"):
        groups = row["psnr_to_teacher"]
        for name in next(iter(groups.values())):
            who, steps = name.split(", ")
            calls = int(steps.split()[0]) * (1 if who == "student" else 2)
            found = (f"{psnr[name]:.1f}" for psnr in groups.values())
            lines.append((row["size"], name, calls, *found))
        columns = ("size", "", "calls", *groups)
    return markdown(columns, lines) if lines else ""


def loss_figure(rows: Sequence[Row]) -> Figure:
    """Loss curves of all sizes: of the training as lines, held out as dots."""
    figure, axes = new(width=8.0, height=4.2)
    plot: Any = axes[0][0]
    for row, tone in zip(rows, TONES, strict=False):
        plot.plot(*zip(*row["history"]["train"], strict=True), color=tone, lw=1.3,
                  label=f"{row['size']}, training")  # fmt: skip
        plot.plot(*zip(*row["history"]["held_out"], strict=True), "o", color=tone, ms=4,
                  label=f"{row['size']}, held out, averaged weights")  # fmt: skip
    plot.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    plot.grid(alpha=0.25, which="both")
    plot.legend(frameon=False)
    return figure
