# SPDX-License-Identifier: Apache-2.0
"""Methods that decide while they run, at thresholds for a share of computed steps."""

from __future__ import annotations

from typing import Any

from ..calibration.errors import CalibrationError
from ..predictors import Predictor
from ..tools.measure import calibrate
from .candidates import easy_cache, thresholds
from .generation import Generation
from .lab import Lab

ROUNDS = 3  # runs that EasyCache's threshold is looked for in


def found_thresholds(generation: Generation, seed: int, steps: int, share: float) -> dict[str, Any]:
    """Recipes by name from one calibration run, as plain values; none where nothing can be calibrated."""
    try:
        found = calibrate(
            lambda cache: generation.call(cache, steps, seed), generation.target, model="tuned"
        )
    except CalibrationError:  # nothing is known of where the blocks of this model are
        return {"recipes": []}
    made = thresholds(found, share, steps)
    return {"recipes": [(c.name, c.recipe.to_dict()) for c in made if c.recipe is not None]}


def bisect_easy_cache(lab: Lab, what: Predictor, steps: int, share: float) -> None:
    """EasyCache's threshold for a share of computed steps."""
    low, high = 0.01, 1.0
    for _ in range(ROUNDS):
        middle = (low * high) ** 0.5
        trial = lab.measure(easy_cache(float(f"{middle:.2g}"), what, steps), lab.seeds[0])
        few = trial.computed <= share * trial.taken
        low, high = (low, middle) if few else (middle, high)
