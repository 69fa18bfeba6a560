"""What stands in for a skipped value: weights over a short history. No tensors here.

Every predictor is a weighted sum of the last values (or of their difference table), newest first. The
history itself, its storage and its kernels are in `state.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .policies.base import flag, interval_of, real, whole

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


@dataclass(frozen=True)
class Taylor(Predictor):
    """Taylor forecast of the given order from backward differences of raw values.

    order: 0 to 4; 0 is plain reuse. spacing: "latest" divides every difference by the latest gap, as
    diffusers does; "exact" is the polynomial through the kept values, also on uneven steps.
    skip_first: never use step 0, an outlier of most models, once another value exists.
    Source: TaylorSeer (arXiv 2503.06923).
    """

    order: int = 1
    spacing: str = "latest"
    skip_first: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole("Taylor", "order", self.order, 0, MAX_ORDER))
        if self.spacing not in ("latest", "exact"):
            raise ValueError(f"Taylor: spacing is {self.spacing!r}, must be 'latest' or 'exact'")
        flag("Taylor", "skip_first", self.skip_first)

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.order + 1

    @property
    def forecasts(self) -> bool:  # type: ignore[override]
        return self.order > 0

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        if self.skip_first and len(steps) > 1 and steps[-1] == 0:
            steps = steps[:-1]
        rule = latest_gap_weights if self.spacing == "latest" else polynomial_weights
        return rule(tuple(steps[0] - s for s in steps), step - steps[0])


@dataclass(frozen=True)
class TaylorTable(Predictor):
    """Taylor forecast from a difference table kept in `dtype`: diffusers' own form and rounding.

    dtype: a torch dtype, or None for that of the values. Prefer `Taylor`, which keeps raw values.
    """

    order: int = 1
    dtype: Any = None
    table = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole("TaylorTable", "order", self.order, 0, MAX_ORDER))

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.order + 1

    @property
    def forecasts(self) -> bool:  # type: ignore[override]
        return self.order > 0

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """Coefficients o^k / k! of the factors, o steps after the last refresh."""
        offset = step - steps[0]
        return tuple(offset**k / math.factorial(k) for k in range(min(len(steps), self.depth)))


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


@dataclass(frozen=True)
class Guided(Predictor):
    """Weights that would have predicted the guide of this very step from its own history.

    order: differences used, 1 or 2; order + 1 values are kept and needed. guide: what is looked at on every
    step: "residual" of the first block (which then always runs), "modulated", its normalised and
    timestep-modulated input, or "input", what enters it. ridge: pull toward Taylor order 1. tokens: every
    how many-th token the guide keeps. max_misfit: compute the step after one whose guide was explained
    worse than this (None: never; reads one number of the step before).
    Weights stay on the device from end to end. Related: DiCache (one direction of a probe residual),
    TeaCache (the modulated input as a signal), dynamic mode decomposition.
    """

    order: int = 2
    guide: str = "residual"
    ridge: float = 0.003
    tokens: int = 4
    max_misfit: float | None = None
    forecasts = True

    def __post_init__(self) -> None:
        whole("Guided", "order", self.order, 1, 2)
        if self.guide not in ("residual", "modulated", "input"):
            raise ValueError(
                f"Guided: guide is {self.guide!r}, must be 'residual', 'modulated' or 'input'"
            )
        object.__setattr__(self, "ridge", real("Guided", "ridge", self.ridge, 0.0))
        whole("Guided", "tokens", self.tokens, 1)
        if self.max_misfit is not None:
            object.__setattr__(
                self, "max_misfit", real("Guided", "max_misfit", self.max_misfit, 0.0)
            )

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.order + 1

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """The prior: Taylor's weights of the differences, order 1."""
        gap = steps[0] - steps[1] if len(steps) > 1 else 1
        return ((step - steps[0]) / gap, *(0.0,) * (self.order - 1))


@lru_cache(maxsize=4096)
def latest_gap_weights(back: tuple[int, ...], offset: int) -> tuple[float, ...]:
    """Weights that equal a difference table in which every difference is divided by the latest gap.

    back: how many steps before the newest each value lies, (0, 2, 3, ...). offset: steps past the newest.
    """
    count = len(back)
    table = [[float(i == m) for i in range(count)] for m in range(count)]  # order 0 at each refresh
    total, scale = list(table[0]), 1.0
    for order in range(1, count):
        table = [
            [(a - b) / (back[m + 1] - back[m]) for a, b in zip(table[m], table[m + 1], strict=True)]
            for m in range(count - order)
        ]
        scale *= offset / order
        total = [t + scale * d for t, d in zip(total, table[0], strict=True)]
    return tuple(total)


@lru_cache(maxsize=4096)
def polynomial_weights(back: tuple[int, ...], offset: int) -> tuple[float, ...]:
    """Lagrange weights of the polynomial through all values, at `offset` steps past the newest."""
    return tuple(
        math.prod((offset + other) / (other - own) for j, other in enumerate(back) if j != i)
        for i, own in enumerate(back)
    )
