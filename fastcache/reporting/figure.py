# SPDX-License-Identifier: Apache-2.0
"""What all pictures have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, PALE, GRID = "#1f2933", "#dfe6ee", "#c3ccd6"


COLOURS = ("#2f6db3", "#c8553d", "#3a8f5c", "#8458b3", "#b8860b", "#20808d")


ROWS = 12  # contexts drawn


def tidy_axes(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=INK)


def save_figure(figure: Any, path: str | Path) -> Path:
    figure.savefig(path, dpi=130)
    return Path(path)


def new_figure(width: float, height: float) -> Any:
    """A figure of its own, which leaves a notebook's backend and open figures alone."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture needs matplotlib: pip install matplotlib, or pip install "
            "'fastcache-dit[bench]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")
