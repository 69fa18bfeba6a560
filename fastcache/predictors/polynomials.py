# SPDX-License-Identifier: Apache-2.0
"""Forecasts in other polynomials than Taylor's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..checks import real, whole
from .base import MAX_ORDER, OfOrder, Predictor
from .taylor import latest_gap_differences


@dataclass(frozen=True)
class Hermite(OfOrder):
    """Taylor's forecast with x^k replaced by scale^k * H_k(scale * x), H the physicists' Hermite polynomials.

    x is the number of steps past the newest value; differences are those of `Taylor(order)`.

    Args:
        order: of the forecast, 0 to 4; order + 1 values are kept, and 0 is plain reuse.
        scale: unitless, larger than 0 and smaller than 1; smaller ones forecast less.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: HiCache (arXiv 2508.16984).
    """

    order: int = 1
    scale: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole("Hermite", "order", self.order, 0, MAX_ORDER))
        object.__setattr__(self, "scale", real("Hermite", "scale", self.scale, 0.0))
        if not 0 < self.scale < 1:
            raise ValueError(f"Hermite: scale is {self.scale}, must be > 0 and < 1")

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        back = tuple(steps[0] - s for s in steps)
        return _hermite_weights(back, step - steps[0], self.scale)


@lru_cache(maxsize=4096)
def _hermite_weights(back: tuple[int, ...], offset: int, scale: float) -> tuple[float, ...]:
    x = 2.0 * scale * offset
    before, now, total = 0.0, 1.0, [0.0] * len(back)
    for k, difference in enumerate(latest_gap_differences(back)):
        factor = scale**k * now / math.factorial(k)
        total = [t + factor * d for t, d in zip(total, difference, strict=True)]
        before, now = now, x * now - 2.0 * k * before
    return tuple(total)


@dataclass(frozen=True)
class Chebyshev(Predictor):
    """A Chebyshev series over the run, fitted to the kept values by ridge regression.

    With tau = 2 t / T - 1 for step t of T, the value at t is the sum of `degree` + 1 polynomials T_j(tau) with
    coefficients from least squares. Where the length of the run is not known, T is the step to predict.
    While one value is kept it is reused.

    Args:
        degree: highest polynomial, a count >= 0.
        ridge: pull of the coefficients toward zero, unitless, >= 0.
        keep: values kept and fitted, 1 to 7: as many as one launch sums with what they are added to.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: Spectrum (arXiv 2603.01623).
    """

    degree: int = 4
    ridge: float = 0.1
    keep: int = 6
    per_run = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "degree", whole("Chebyshev", "degree", self.degree, 0, 16))
        object.__setattr__(self, "ridge", real("Chebyshev", "ridge", self.ridge, 0.0))
        object.__setattr__(self, "keep", whole("Chebyshev", "keep", self.keep, 1, 7))

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Values kept."""
        return self.keep

    @property
    def forecasts(self) -> bool:  # type: ignore[override]
        """Whether there is anything to extrapolate."""
        return self.keep > 1 and self.degree > 0

    def weights(
        self, steps: tuple[int, ...], step: int, total: int | None = None
    ) -> tuple[float, ...]:
        """Weights of the kept values.

        Args:
            steps: step indices of the kept values, newest first.
            step: index of the step to predict.
            total: denoiser calls of the run, a count; None where not known.
        Returns:
            Unitless weights, newest first, one per value.
        """
        if len(steps) < 2:
            return (1.0,)
        return _series_weights(steps, step, total or step, self.degree, self.ridge)


@lru_cache(maxsize=4096)
def _series_weights(
    steps: tuple[int, ...], step: int, total: int, degree: int, ridge: float
) -> tuple[float, ...]:
    """phi(step)^T (Phi^T Phi + ridge I)^-1 Phi^T, phi the polynomials at a step and Phi those at all kept ones."""
    at = 2.0 * np.array([step, *steps], dtype=np.float64) / total - 1.0
    wanted, *kept = np.polynomial.chebyshev.chebvander(at, degree)
    known = np.stack(kept)
    system = known.T @ known + ridge * np.eye(degree + 1)
    # without a ridge, fewer values than polynomials leave the system singular
    return tuple(float(w) for w in wanted @ np.linalg.pinv(system, hermitian=True) @ known.T)
