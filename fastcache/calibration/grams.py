# SPDX-License-Identifier: Apache-2.0
"""Inner products as a calibration keeps them, by context, as matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .errors import CalibrationError
from .fields import MAX_GRAM

Array = np.ndarray
Rows = Sequence[Sequence[float]]  # of a lower triangle
Gram = list[list[float]]  # the whole matrix
Grams = dict[tuple[str, str], list[Gram]]  # by (model, context), one per run


def gram_of(grams: Mapping[str, Rows], context: str | None) -> Array:
    """All inner products of `Calibration.grams`, of one context or the mean of all."""
    if not grams:
        raise CalibrationError(
            f"calibration: grams is empty; fastcache.calibrate(run, target) records them of runs of at most {MAX_GRAM} "
            "steps"
        )
    if context is not None and context not in grams:
        raise CalibrationError(f"calibration: context must be one of {list(grams)}")
    names = list(grams) if context is None else [context]
    if len({len(grams[name]) for name in names}) > 1:
        raise CalibrationError(
            f"calibration: context must be one of {names}, whose runs differ in length"
        )
    found = []
    for name in names:
        rows = grams[name]
        lower = np.array([[*row, *[0.0] * (len(rows) - len(row))] for row in rows])
        found.append(lower + np.tril(lower, -1).T)
    whole_gram: Array = np.mean(found, axis=0)
    return whole_gram
