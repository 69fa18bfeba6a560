# SPDX-License-Identifier: Apache-2.0
"""TeaCache's polynomial, fitted to what a calibration has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DEGREE = 4
POOR = 0.5  # an R² below which a fit says little


class InputFit(NamedTuple):
    """A polynomial from the change of the first block's modulated input to that of the model's output.

    coefficients: five of them, highest power first, unitless. r2: the share of the output's variance that it
    explains, at most 1. pairs: how many changes it was fitted to.
    """

    coefficients: tuple[float, ...]
    r2: float
    pairs: int

    def __str__(self) -> str:
        return f"polynomial of {self.pairs} changes, R² {self.r2:.3f}"


def fitted(pairs: Sequence[tuple[float, float]]) -> InputFit:
    """Least squares over (change of the input, change of the output)."""
    x, y = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    degree = min(DEGREE, len(np.unique(x)) - 1)
    if degree:
        line = np.polynomial.Polynomial.fit(x, y, degree)
        ascending = line.convert().coef
    else:
        ascending = np.array([y.mean()])
    descending = map(float, ascending[::-1])
    highest_first = [0.0] * (DEGREE + 1 - len(ascending)) + list(descending)
    missed = float(((np.polyval(highest_first, x) - y) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - missed / spread if spread else float(missed == 0)
    return InputFit(tuple(highest_first), r2, len(pairs))
