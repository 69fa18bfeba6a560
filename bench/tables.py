# SPDX-License-Identifier: Apache-2.0
"""Tables of results in Markdown: what all of them have in common."""

from __future__ import annotations

from collections.abc import Sequence

from .common import Row


def markdown(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    cells = [["" if c is None else str(c).replace("|", "/") for c in line] for line in lines]
    rule = f"|{'---|' * len(columns)}"
    return "\n".join((f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(c)} |" for c in cells)))


def of(rows: Sequence[Row], bench: str, **fields: object) -> list[Row]:
    """CPU rows of one benchmark with these fields."""
    wanted = {"bench": bench, "kind": "cpu", **fields}
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def cell(
    rows: Sequence[Row],
    steps: int,
    guidance: str = "none",
    model: str = "flux",
    dtype: str = "fp32",
) -> list[Row]:
    """CPU rows of one cell of the quality benchmark."""
    fields = {"steps": steps, "guidance": guidance, "model": model, "dtype": dtype}
    return of(rows, "quality", **fields)


def digits(value: float | None, places: int = 1) -> str:
    return "" if value is None else f"{value:.{places}f}"


def padded(rows: Sequence[Sequence[object]], width: int) -> list[tuple[object, ...]]:
    """Rows of as many cells."""
    return [(*row, *[""] * (width - len(row))) for row in rows]
