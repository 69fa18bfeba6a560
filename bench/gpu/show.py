# SPDX-License-Identifier: Apache-2.0
"""Rows of a run on a GPU as tables, for the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..common import Row

HEAD = ("bench", "stage", "name")
Table = tuple[str, list[str], list[list[str]]]  # title, columns, lines


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One table per stage and kind of row, in order of the run; what was measured and nothing else."""
    for stage, name in dict.fromkeys((r["stage"], r["name"]) for r in rows):
        found = [values(r) for r in rows if (r["stage"], r["name"]) == (stage, name)]
        columns = list(dict.fromkeys(key for row in found for key in row))
        lines = [[text(row.get(key)) for key in columns] for row in found]
        yield f"{stage}: {name}", columns, lines


def values(row: Row) -> Row:
    """A row without where it comes from, which follows what was measured."""
    keys = list(row)
    return {key: row[key] for key in keys[: keys.index("device")] if key not in HEAD}


def text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(text, value))
    return "" if value is None else str(value)
