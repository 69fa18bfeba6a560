# SPDX-License-Identifier: Apache-2.0
"""What to believe of candidates, from what was expected of them and what has come of similar ones.

Kriging: by how much runs were nearer than expected is taken for a normal field over candidates, alike where the
predictor is the same and where the schedules have most of their steps in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .plans import Planned

# Standard deviations in dB: of all candidates of a step count alike, of a predictor, of a schedule, of both together,
# and of a run by itself.
ALL, PREDICTOR, SCHEDULE, BOTH, RUN = 20.0, 1.5, 1.5, 1.0, 1.0
ALIKE = 2.0  # steps of two schedules that differ, after which they have little in common
BOLD = 0.5  # standard deviations that what is not known yet is believed better


def believed(tried: Sequence[tuple[Planned, float]], asked: Sequence[Planned]) -> np.ndarray:
    """dB of each of the asked, a little more where little is known.

    tried: with what came of them, dB; where there are none, what is expected is all there is.
    """
    expected = np.array([p.expected for p in asked])
    if not tried or not asked:
        return expected
    known = [p for p, _ in tried]
    came = np.array([came - p.expected for p, came in tried])
    between = _together(known, known) + RUN**2 * np.eye(len(known))
    across = _together(asked, known)
    weights = np.linalg.solve(between, across.T).T
    spread = ALL**2 + PREDICTOR**2 + SCHEDULE**2 + BOTH**2 - (weights * across).sum(1)
    mean = np.median(came)
    found: np.ndarray = (
        expected + mean + weights @ (came - mean) + BOLD * np.sqrt(np.maximum(spread, 0.0))
    )
    return found


def _together(a: Sequence[Planned], b: Sequence[Planned]) -> np.ndarray:
    """Covariances, dB^2."""
    same = np.array([[p.predictor == q.predictor for q in b] for p in a], dtype=float)
    left, right = (np.array([p.marks for p in group], dtype=float) for group in (a, b))
    apart = left @ (1 - right).T + (1 - left) @ right.T
    alike = np.exp(-apart / 2 / ALIKE)
    return ALL**2 + PREDICTOR**2 * same + alike * (SCHEDULE**2 + BOTH**2 * same)
