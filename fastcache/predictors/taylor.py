# SPDX-License-Identifier: Apache-2.0
"""Taylor forecasts, from raw values or from a table of differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ..checks import flag, whole
from .base import MAX_ORDER, OfOrder


@dataclass(frozen=True)
class Taylor(OfOrder):
    """Taylor forecast of the given order from backward differences of raw values.

    Args:
        order: of the forecast, 0 to 4; order + 1 values are kept, and 0 is plain reuse.
        spacing: "latest" divides every difference by the latest gap, as diffusers does; "exact" is the
            polynomial through the kept values, also on uneven steps.
        skip_first: whether to leave out the value of step 0, an outlier of most models, once another
            one is kept.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range or no known spacing; the message names it.
    Source: TaylorSeer (arXiv 2503.06923), differences of diffusers 0.42.1.
    """

    order: int = 1
    spacing: Literal["latest", "exact"] = "latest"
    skip_first: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole("Taylor", "order", self.order, 0, MAX_ORDER))
        if self.spacing not in ("latest", "exact"):
            raise ValueError(f"Taylor: spacing is {self.spacing!r}, must be 'latest' or 'exact'")
        flag("Taylor", "skip_first", self.skip_first)

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        if self.skip_first and len(steps) > 1 and steps[-1] == 0:
            steps = steps[:-1]
        rule = latest_gap_weights if self.spacing == "latest" else polynomial_weights
        return rule(steps_back(steps), step - steps[0])


@dataclass(frozen=True)
class TaylorTable(OfOrder):
    """Taylor forecast from a difference table kept in `dtype`: diffusers' own form and rounding.

    `Taylor` forecasts the same from raw values, without rounding in between; prefer it where equality
    with diffusers is not wanted.

    Args:
        order: of the forecast, 0 to 4; order + 1 factors are kept.
        dtype: floating torch dtype of the factors; None: that of the values.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: `order` is out of its range; the message names it.
    Source: TaylorSeer (arXiv 2503.06923), difference table of diffusers 0.42.1.
    """

    order: int = 1
    dtype: Any = None
    table = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole("TaylorTable", "order", self.order, 0, MAX_ORDER))
        if self.dtype is not None and getattr(self.dtype, "is_floating_point", None) is not True:
            raise TypeError(
                f"TaylorTable: dtype is {self.dtype!r}, must be a floating torch dtype or None"
            )

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """Coefficients o^k / k! of the factors, o steps after the last computed one.

        Args:
            steps: step indices of the computed steps in the table, newest first.
            step: index of the step to predict.
        Returns:
            One unitless coefficient per factor, order 0 first.
        """
        offset = step - steps[0]
        return tuple(offset**k / math.factorial(k) for k in range(min(len(steps), self.depth)))


@lru_cache(maxsize=4096)
def steps_back(steps: tuple[int, ...]) -> tuple[int, ...]:
    """How many steps before the newest each value lies, (0, 2, 3, ...)."""
    return tuple(steps[0] - s for s in steps)


@lru_cache(maxsize=4096)
def latest_gap_weights(back: tuple[int, ...], offset: int) -> tuple[float, ...]:
    """Weights that equal a difference table in which every difference is divided by the latest gap.

    Args:
        back: how many steps before the newest each value lies, (0, 2, 3, ...).
        offset: steps past the newest value.
    Returns:
        Unitless weights, newest first.
    """
    first, *others = latest_gap_differences(back)
    total, scale = list(first), 1.0
    for order, difference in enumerate(others, 1):
        scale *= offset / order
        total = [t + scale * d for t, d in zip(total, difference, strict=True)]
    return tuple(total)


@lru_cache(maxsize=4096)
def latest_gap_differences(back: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    """Backward differences of every order, each divided by the latest gap, as weights of the values.

    Args:
        back: how many steps before the newest each value lies, (0, 2, 3, ...).
    Returns:
        Per order, 0 first, unitless weights, newest first.
    """
    count = len(back)
    table = [[float(i == m) for i in range(count)] for m in range(count)]  # order 0 at each refresh
    found = [tuple(table[0])]
    for order in range(1, count):
        table = [
            [(a - b) / (back[m + 1] - back[m]) for a, b in zip(table[m], table[m + 1], strict=True)]
            for m in range(count - order)
        ]
        found.append(tuple(table[0]))
    return tuple(found)


@lru_cache(maxsize=4096)
def polynomial_weights(back: tuple[int, ...], offset: int) -> tuple[float, ...]:
    """Lagrange weights of the polynomial through all values, at `offset` steps past the newest."""
    return tuple(
        math.prod((offset + other) / (other - own) for j, other in enumerate(back) if j != i)
        for i, own in enumerate(back)
    )
