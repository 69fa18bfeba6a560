# SPDX-License-Identifier: Apache-2.0
"""What forecasts leave wrong, as coefficients of the values of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .. import sync
from ..ops import dispatch
from ..predictors import Predictor
from .grams import Array


class Missed:
    """The forecast less the value, of any step from any computed ones.

    steps: of the run. what: gives the weights. guide: [T, T], inner products of what a guided predictor looks at;
    None for others.
    """

    def __init__(self, steps: int, what: Predictor, guide: Array | None = None) -> None:
        self.steps, self.what, self.guide = steps, what, guide

    def __call__(self, kept: tuple[int, ...], step: int) -> Array:
        """[T]. kept: computed steps, the newest first."""
        found = np.zeros(self.steps)
        kept = kept[: self.what.depth]
        for at, weight in zip(kept, self.weights(kept, step), strict=False):
            found[at] += weight
        found[step] -= 1.0
        return found

    def weights(self, kept: tuple[int, ...], step: int) -> Sequence[float]:
        """Of the values of these steps."""
        weights: Callable[..., Any] = self.what.weights
        args = (kept, step, self.steps) if self.what.per_run else (kept, step)
        found: Sequence[float] = weights(*args)
        return found if self.guide is None else self._guided(kept, step, found)

    def _guided(self, kept: tuple[int, ...], step: int, prior: Sequence[float]) -> Sequence[float]:
        """Those that would have forecast the guide, as the op solves for them on the device."""
        if len(kept) < self.what.needs:  # the runtime computes until there are as many
            return (1.0,)
        kept = (
            *kept,
            *kept[-1:] * (self.what.depth - len(kept)),
        )  # as it does in the place of those to come
        now, differences = (step, kept[0]), list(pairwise(kept))
        pairs = [(a, b) for i, a in enumerate(differences) for b in differences[i:]]
        pairs += [(a, now) for a in differences] + [(now, now)]
        sums = torch.tensor([[self._product(a, b) for a, b in pairs]], dtype=torch.float64)
        solve = dispatch.function(dispatch.active("cpu"), "guided_solve")
        weights, _ = solve(sums, torch.tensor(prior), self.what.ridge, False)
        return sync.numbers([weights])

    def _product(self, a: tuple[int, int], b: tuple[int, int]) -> float:
        """The inner product of two differences of the guide's values."""
        assert self.guide is not None
        (p, q), (r, s) = a, b
        gram = self.guide
        return float(gram[p, r] - gram[p, s] - gram[q, r] + gram[q, s])
