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

    steps: of the run. what: gives the weights. gram: [T, T], inner products of the values. guide: the same of what a
    guided predictor looks at; None for others.
    """

    def __init__(
        self, steps: int, what: Predictor, gram: Array, guide: Array | None = None
    ) -> None:
        self.steps, self.what, self.gram, self.guide = steps, what, gram, guide

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
        what, guide = self.what, self.guide
        if len(kept) < what.needs:  # the runtime computes until there are as many
            return (1.0,)
        # as it does in the place of those to come
        places = (*kept, *kept[-1:] * (what.depth - len(kept)))
        sums, pull = _sums(guide, places, step), torch.tensor(prior)
        backend = dispatch.active("cpu")
        if what.checked:
            before = torch.tensor(what.weights(kept[1:], kept[0])[: what.depth - 2])
            newest, *older = places
            known = _sums(self.gram, older, newest)
            solve = dispatch.function(backend, "guided_check")
            weights, _ = solve(sums, [known], pull, before, what.ridge)
        else:
            solve = dispatch.function(backend, "guided_solve")
            weights, _ = solve(sums, pull, what.ridge, True)
        return sync.numbers([weights[:, 1:]])


def _sums(gram: Any, kept: Sequence[int], step: int) -> torch.Tensor:
    """[1, M]: what `guided_sums` gives for the value at a step and those kept, from inner products [T, T]."""

    def product(a: tuple[int, int], b: tuple[int, int]) -> float:
        (p, q), (r, s) = a, b
        return float(gram[p, r] - gram[p, s] - gram[q, r] + gram[q, s])

    now, differences = (step, kept[0]), list(pairwise(kept))
    pairs = [(a, b) for i, a in enumerate(differences) for b in differences[i:]]
    pairs += [(a, now) for a in differences] + [(now, now)]
    return torch.tensor([[product(a, b) for a, b in pairs]], dtype=torch.float64)
