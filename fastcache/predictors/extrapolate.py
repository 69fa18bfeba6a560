"""FasterCache's extrapolation of attention outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..checks import flag, interval_of, real
from .base import Predictor


@dataclass(frozen=True)
class Extrapolate(Predictor):
    """newest + weight * (newest - older).

    weight: unitless, or a callable of the module that returns it. feeds_back: predicted values enter the
    history, as in diffusers. ramp: (first, last) step between which the weight rises from 0 to its full
    value, as the paper has it: weight 0.9, ramp (7, 27) for 30 steps of Open-Sora.
    Source: FasterCache (arXiv 2410.19355), attention outputs.
    """

    weight: float | Callable[[Any], float] = 0.5
    feeds_back: bool = True
    ramp: tuple[int, int] | None = None
    depth = 2
    forecasts = True

    def __post_init__(self) -> None:
        if not callable(self.weight):
            object.__setattr__(self, "weight", real("Extrapolate", "weight", self.weight))
        flag("Extrapolate", "feeds_back", self.feeds_back)
        if self.ramp is not None:
            interval_of("Extrapolate", "ramp", self.ramp)

    def weights(self, steps: tuple[int, ...], step: int, module: Any = None) -> tuple[float, ...]:
        w = float(self.weight(module)) if callable(self.weight) else self.weight
        if self.ramp is not None:
            first, last = self.ramp
            w *= min(max((step - first) / (last - first), 0.0), 1.0)
        return (1.0 + w, -w) if len(steps) > 1 else (1.0,)
