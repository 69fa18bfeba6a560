# SPDX-License-Identifier: Apache-2.0
"""Weights of their own for each skipped step, fitted to runs that were recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import real, whole
from .base import Predictor
from .taylor import Taylor

Row = tuple[int, tuple[int, ...], tuple[float, ...]]
_LINE = Taylor(order=1, spacing="exact")


@dataclass(frozen=True)
class Fitted(Predictor):
    """A weighted sum whose weights were fitted per step; for other steps, the line through the newest two values.

    `Calibration.fit` makes it, for the computed steps of one schedule.

    Args:
        rows: per skipped step its index, the kept steps that the weights are for, newest first, and as many weights,
            unitless.
        keep: values kept, 1 to 7.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a row does not fit together, or `keep` is out of its range; the message names the field.
    Source: ours, after the idea of L2P (CVPR 2026).
    """

    rows: Sequence[Row] = ()
    keep: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", whole("Fitted", "keep", self.keep, 1, 7))
        if isinstance(self.rows, str) or not hasattr(self.rows, "__iter__"):
            raise TypeError(f"Fitted: rows is {self.rows!r}, must be a sequence of rows")
        rows = tuple(_row(row, self.keep) for row in self.rows)
        object.__setattr__(self, "rows", rows)
        known = {(steps, step): weights for step, steps, weights in rows}
        object.__setattr__(self, "_known", known)

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Values kept."""
        return self.keep

    @property
    def forecasts(self) -> bool:  # type: ignore[override]
        """Whether there is anything to extrapolate."""
        return self.keep > 1

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        known: Any = self._known  # type: ignore[attr-defined]
        found: tuple[float, ...] | None = known.get((steps, step))
        return found if found is not None else _LINE.weights(steps[:2], step)


def _row(row: Any, keep: int) -> Row:
    """A row, checked."""
    try:
        step, steps, weights = row
        held = tuple(whole("Fitted", "rows", s, 0) for s in steps)
        told = tuple(real("Fitted", "rows", w) for w in weights)
        step = whole("Fitted", "rows", step, 1)
    except (TypeError, ValueError):
        raise ValueError(
            "Fitted: rows must hold (step, kept steps, weights), of whole and of finite numbers"
        ) from None
    falls = all(a > b for a, b in zip((step, *held), held, strict=False))
    if not falls or not 1 <= len(held) <= keep or len(held) != len(told):
        raise ValueError(
            f"Fitted: rows holds step {step}, which needs 1 to {keep} earlier steps, newest first, and a weight for "
            "each"
        )
    return step, held, told
