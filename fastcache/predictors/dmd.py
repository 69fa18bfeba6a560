# SPDX-License-Identifier: Apache-2.0
"""A forecast by exponentials that the device fits to the history."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..checks import real, whole
from .base import Predictor


@dataclass(frozen=True)
class DMD(Predictor):
    """Two exponentials and a constant, fitted to the last `keep` values where these are evenly spaced.

    The differences of the values follow a recurrence of two terms, found by least squares from their Gram
    numbers on the device; its eigenvalues carry them on, also by parts of a gap. Where the history is shorter
    or uneven, the forecast is the line through the two newest values.

    Args:
        keep: values kept and fitted, 4 to 8; more of them average out noise.
        ridge: pull of the recurrence toward zero, unitless, relative to the mean square of the differences.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: ours, after dynamic mode decomposition (arXiv 1312.0041): of differences, so that a constant stays.
    """

    keep: int = 4
    ridge: float = 1e-8
    forecasts = True
    tokens = 4  # every so many-th token is fitted

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", whole("DMD", "keep", self.keep, 4, 8))
        object.__setattr__(self, "ridge", real("DMD", "ridge", self.ridge, 0.0))

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Values kept."""
        return self.keep

    @property
    def fitted(self) -> float:
        """The ridge."""
        return self.ridge

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """What the device needs to find the weights.

        Args:
            steps: step indices of the kept values, newest first.
            step: index of the step to predict.
        Returns:
            How many gaps ahead the step lies, 0 while there is one value; and 1 where the history is full
            and evenly spaced, else 0.
        """
        gaps = {newer - older for newer, older in pairwise(steps)}
        reach = (step - steps[0]) / (steps[0] - steps[1]) if gaps else 0.0
        return (reach, float(len(steps) == self.keep and len(gaps) == 1))
