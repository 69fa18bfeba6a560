# SPDX-License-Identifier: Apache-2.0
"""Rows of the quality benchmark that compare with each other, and the best of them at a cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .common import Row
from .subjects import DTYPES, MODES, SUBJECTS, Cell

BUDGETS = tuple(b / 100 for b in range(25, 61, 5))


KEY = ("system", "method", "predictor", "setting")


def cell_of(row: Row) -> Cell:
    return Cell(*(row[k] for k in Cell._fields))


def cells(rows: Sequence[Row]) -> Iterator[tuple[Cell, list[Row]]]:
    """Rows that compare with each other, cell by cell in a fixed order."""
    orders = (list(SUBJECTS), list(DTYPES), None, list(MODES))

    def place(cell: Cell) -> list[int]:
        return [o.index(v) if o else v for o, v in zip(orders, cell, strict=True)]  # type: ignore

    for cell in sorted({cell_of(r) for r in rows}, key=place):
        yield cell, [r for r in rows if cell_of(r) == cell]


def best(rows: Sequence[Row], budget: float) -> Row | None:
    """The row of highest PSNR among those that cost at most `budget`."""
    within = [r for r in rows if r.get("psnr") is not None and r["compute"] <= budget + 1e-9]
    return max(within, key=lambda r: r["psnr"], default=None)


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Per budget: the best of every system, and how far ours is ahead."""
    found = []
    for budget in BUDGETS:
        line: Row = {"budget": budget}
        for system in ("fastcache", "diffusers", "cache-dit", "uncached"):
            row = best([r for r in rows if r["system"] == system], budget)
            line[system] = row["psnr"] if row else None
            line[f"{system} setting"] = " ".join(row[k] for k in KEY[1:]) if row else ""
        reuse = [r for r in rows if r["system"] == "fastcache" and r["predictor"] == "reuse"]
        row = best(reuse, budget)
        line["reuse"] = row["psnr"] if row else None
        found.append(line)
    return found
