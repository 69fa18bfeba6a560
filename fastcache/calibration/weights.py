# SPDX-License-Identifier: Apache-2.0
"""Weights of computed values by least squares, from the inner products that a calibration has recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..checks import limit, whole
from ..predictors import Fitted
from ..predictors.taylor import polynomial_weights


def fitted_weights(gram: np.ndarray, marks: Sequence[bool], keep: int, ridge: float) -> Fitted:
    """Per skipped step the weights whose sum is nearest to its value, pulled toward the line by `ridge`.

    gram: [T, T]. marks: T, which steps are computed, the first among them.
    """
    owner = "Calibration.fit"
    keep, ridge = whole(owner, "keep", keep, 1, 7), limit(owner, "ridge", ridge)
    kept: tuple[int, ...] = ()
    rows = []
    for step, mark in enumerate(marks):
        if mark:
            kept = (step, *kept)[:keep]
            continue
        at = list(kept)
        line = polynomial_weights(tuple(at[0] - s for s in at[:2]), step - at[0])
        prior = np.array([*line, *[0.0] * (len(at) - len(line))])
        known, wanted = gram[np.ix_(at, at)], gram[at, step]
        pull = ridge * np.trace(known) / len(at)
        system = known + pull * np.eye(len(at))
        found = prior + np.linalg.pinv(system, hermitian=True) @ (wanted - known @ prior)
        rows.append((step, kept, tuple(map(float, found))))
    return Fitted(tuple(rows), keep)
