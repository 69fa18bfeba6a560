# SPDX-License-Identifier: Apache-2.0
"""FasterCache's extrapolation of attention outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..checks import flag, interval_of, real
from .base import Predictor


@dataclass(frozen=True)
class Constant:
    """A callable that always gives `weight`, where a config takes nothing but callables.

    Args:
        weight: unitless.
    Raises:
        TypeError: `weight` is no number.
        ValueError: `weight` is not finite.
    """

    weight: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", real("Constant", "weight", self.weight))

    def __call__(self, *asked: Any) -> float:
        return self.weight


@dataclass(frozen=True)
class Extrapolate(Predictor):
    """newest + weight * (newest - older).

    Args:
        weight: unitless, or a callable (module) -> weight, asked on every reused step.
        feeds_back: whether predicted values enter the history, as they do in diffusers.
        ramp: (first, last) step index between which the weight rises linearly from 0 to its full
            value; None: no ramp. The paper has weight 0.9 and ramp (7, 27) for 30 steps of Open-Sora.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: `weight` is not finite, or `ramp` not first < last; the message names it.
    Source: FasterCache (arXiv 2410.19355), attention outputs; feedback of diffusers 0.42.1.
    """

    weight: float | Callable[[Any], float] = 0.5
    feeds_back: bool = True
    ramp: tuple[float, float] | None = None
    depth = 2
    forecasts = True

    def __post_init__(self) -> None:
        if not callable(self.weight):
            object.__setattr__(self, "weight", real("Extrapolate", "weight", self.weight))
        flag("Extrapolate", "feeds_back", self.feeds_back)
        if self.ramp is not None:
            object.__setattr__(self, "ramp", interval_of("Extrapolate", "ramp", self.ramp))

    @property
    def per_module(self) -> bool:
        """Whether `weight` is a callable of the module."""
        return callable(self.weight)

    def weights(self, steps: tuple[int, ...], step: int, module: Any = None) -> tuple[float, ...]:
        """Weights of the newest and the older value.

        Args:
            steps: step indices of the kept values, newest first; one or two.
            step: index of the step to predict.
            module: what a callable `weight` is asked about.
        Returns:
            (1 + w, -w), or (1,) while only one value is there.
        """
        w = float(self.weight(module)) if callable(self.weight) else self.weight
        if self.ramp is not None:
            first, last = self.ramp
            w *= min(max((step - first) / (last - first), 0.0), 1.0)
        return (1.0 + w, -w) if len(steps) > 1 else (1.0,)
