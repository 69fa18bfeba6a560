# SPDX-License-Identifier: Apache-2.0
"""Which of two parts belong together, when what a pair comes to is about a sum of what its parts do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TypeVar

import numpy as np

Row = TypeVar("Row")
Column = TypeVar("Column")


def promising(
    found: Mapping[tuple[Row, Column], float], rows: Sequence[Row], columns: Sequence[Column]
) -> tuple[Row, Column] | None:
    """The untried pair that should come to most: least squares of a sum over the tried ones; None where none is left.

    A part that was tried in no pair counts as one of middling worth.
    """
    known = {pair: value for pair, value in found.items() if np.isfinite(value)}
    if not known:
        return None
    at = {("row", r): i for i, r in enumerate(rows)} | {
        ("column", c): len(rows) + i for i, c in enumerate(columns)
    }
    matrix = np.zeros((len(known), len(at)))
    for line, (row, column) in zip(matrix, known, strict=True):
        line[at["row", row]] = line[at["column", column]] = 1.0
    values = np.array(list(known.values()))
    parts = np.linalg.lstsq(matrix, values - values.mean(), rcond=None)[0]
    left = [pair for pair in product(rows, columns) if pair not in found]
    return max(
        left,
        key=lambda pair: parts[at["row", pair[0]]] + parts[at["column", pair[1]]],
        default=None,
    )
