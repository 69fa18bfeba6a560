# SPDX-License-Identifier: Apache-2.0
"""Methods that decide while they run: at thresholds from a calibrated run, and EasyCache, whose none tells."""

from __future__ import annotations

from collections.abc import Callable

from ..calibration.calibration import Calibration
from ..calibration.nearby import Marks
from ..policies import Interval
from ..predictors import Predictor, Reuse, Taylor
from ..recipe import Recipe
from .candidates import Candidate, easy_cache, thresholds
from .lab import Lab, Trial

CLOSE = 2.0  # dB that the others may be behind and EasyCache is tried
RUNS = 3  # that EasyCache's threshold is looked for in


def try_deciding(
    lab: Lab,
    calibration: Calibration,
    steps: int,
    best: Trial | None,
    most: float,
    close: Callable[[Candidate, Marks], bool],
) -> None:
    """Run them with the first seed, at about a cost.

    steps: `num_inference_steps` of the calibrated run. best: of what was tried; the same decisions with a forecast or
    without one: what the predictors have shown holds for them too. close: whether one should come near the best, by the
    steps that it would have computed along the calibrated run.
    """
    taken = lab.taken(steps)
    kind = Candidate("", Recipe(Interval(2)), steps).kind
    share = max(lab.cost.affordable(kind, taken, most) / taken, 1.5 / taken)
    recipe = None if best is None else best.candidate.recipe
    forecasts = recipe is None or recipe.rules[0].what.forecasts
    tried = [
        lab.measure(c, lab.seeds[0])
        for c, marks in thresholds(calibration, share, steps)
        if c.recipe is not None
        and c.recipe.rules[0].what.forecasts == forecasts
        and close(c, marks)
    ]
    near = max((t.quality for t in tried), default=None)
    if best is None or (near is not None and near > best.quality - CLOSE):
        _bisect_easy_cache(lab, Taylor(1) if forecasts else Reuse(), steps, share)


def _bisect_easy_cache(lab: Lab, what: Predictor, steps: int, share: float) -> None:
    low, high = 0.01, 1.0
    for _ in range(RUNS):
        middle = (low * high) ** 0.5
        trial = lab.measure(easy_cache(float(f"{middle:.2g}"), what, steps), lab.seeds[0])
        few = trial.computed <= share * trial.taken
        low, high = (low, middle) if few else (middle, high)
