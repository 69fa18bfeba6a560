# SPDX-License-Identifier: Apache-2.0
"""The picture of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from . import require

CURVE_FILE = "loss_curve.png"


@dataclass
class History:
    """Training loss per step, and (step, held-out loss of the averaged weights)."""

    train: list[float]
    held_out: list[tuple[int, float]]


def plot_history(history: History, path: Path) -> None:
    """The loss curve as a PNG."""
    require("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(history.train, color="#b8c4d6", lw=0.6, label="batch")
    window = max(1, len(history.train) // 50)
    smooth = torch.tensor(history.train).unfold(0, window, 1).mean(-1)
    centres = range(window // 2, window // 2 + len(smooth))
    axes.plot(centres, smooth, color="#30507a", label=f"mean of {window} batches")
    if history.held_out:
        steps, losses = zip(*history.held_out, strict=True)
        axes.plot(steps, losses, "o-", color="#c8553d", ms=4, label="held out, averaged weights")
    axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
