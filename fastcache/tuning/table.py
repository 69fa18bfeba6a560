# SPDX-License-Identifier: Apache-2.0
"""A tuning in words and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .rows import Row

SHOWN = 12  # rows

COLUMNS = ("", "steps", "computed", "seconds", "speed-up", "PSNR dB", "seeds")


def table(tried: Sequence[Row], wish: str, verdict: str) -> str:
    """Wish, the better rows with the best ones without a cache among them, verdict."""
    rows = list(tried[:SHOWN])
    rows += [r for r in tried[SHOWN:] if r.recipe is None][:2]
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        )
        for name, *rest in cells
    ]
    more = len(tried) - len(rows)
    lines += [f"... and {more} more"] * (more > 0)
    return "\n".join([wish, "", *lines, "", verdict])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        str(row.steps),
        f"{row.computed:.4g}",
        f"{row.seconds:.3g}",
        f"{row.speedup:.2f}x",
        "equal" if math.isinf(row.psnr) else f"{row.psnr:.1f}",
        str(len(row.seeds)),
    )
