"""The latest value again, or zeros."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Predictor


@dataclass(frozen=True)
class Reuse(Predictor):
    """The newest value, unchanged."""

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        return (1.0,)


@dataclass(frozen=True)
class Zeros(Predictor):
    """Zeros in place of the value: what TaylorSeer's lite mode returns from inactive modules."""

    depth = 0

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        return ()
