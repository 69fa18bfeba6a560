"""What a predictor is: weights over a short history."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ORDER = 4


@dataclass(frozen=True)
class Predictor:
    """How a skipped value follows from its history.

    depth: values kept. forecasts: whether it extrapolates (guards default to what forecasting needs).
    table: the history is a difference table that a refresh updates in place, not a ring of raw values.
    """

    depth = 1
    forecasts = False
    table = False
    feeds_back = False  # predicted values enter the history too

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """Weights of the values computed at `steps` (newest first) for their value at `step`."""
        raise NotImplementedError
