# SPDX-License-Identifier: Apache-2.0
"""What a predictor is: weights over a short history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

MAX_ORDER = 4

GuideName = Literal["residual", "modulated", "input", "auto"]


@dataclass(frozen=True)
class Predictor:
    """How a skipped value follows from its history, as a weighted sum. A subclass writes `weights`.

    Class attributes (or properties): `depth` is how many values are kept, a count; `needs` how many of them there
    must be before the first forecast, steps until then being computed; `forecasts` whether
    they are extrapolated, so that the recipe's guards are those of a forecast; `table` whether the
    history is a table of differences that a computed step updates in place, kept in `dtype`;
    `feeds_back` whether predicted values enter the history too; `per_run` whether the weights differ by the
    length of the run: `weights` then takes it, or None where it is not known, as a third argument. `fitted`
    is the ridge with which the device fits exponentials to the history, where `weights` gives what it needs
    (see `DMD`). `guide` says what is looked at on every step where the device computes the weights, every
    `tokens`-th token of it, with a pull `ridge` toward those of `weights`; a misfit above `max_misfit` then
    computes the next step; `checked` says whether the kept values have a say in how far it is followed.
    """

    depth = 1
    needs = 1
    forecasts = False
    table = False
    feeds_back = False
    per_run = False
    tokens = 1
    ridge = 0.0
    checked = False

    @property
    def per_module(self) -> bool:
        """Whether the weights differ by module: `weights` then takes the module as a third argument."""
        return False

    @property
    def dtype(self) -> Any:
        """The torch dtype that a table is kept in; None: that of the values."""
        return None

    @property
    def fitted(self) -> float | None:
        """The ridge, unitless, of a fit to the history on the device; None: the weights are known beforehand."""
        return None

    @property
    def guide(self) -> GuideName | None:
        """What is looked at on every step; None: the weights depend on step numbers alone."""
        return None

    @property
    def max_misfit(self) -> float | None:
        """The misfit of a reused step, unitless, above which the next step is computed; None: no limit."""
        return None

    def on_block(self, modulated: bool) -> Predictor:
        """The predictor for one model, what it leaves to the first block filled in.

        Args:
            modulated: whether the block's modulated input is known.
        Returns:
            Itself, unless something is left to the block.
        """
        return self

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """Weights of the kept values in the sum that stands in for the value at `step`.

        Args:
            steps: step indices of the kept values, newest first; at least one, at most `depth`.
            step: index of the step to predict, larger than all of them.
        Returns:
            Unitless weights, newest first, as many as are used.
        """
        raise NotImplementedError


class OfOrder(Predictor):
    """A forecast of an order, from as many values and one more; of order 0 it is plain reuse."""

    order: int

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Values kept."""
        return self.order + 1

    @property
    def forecasts(self) -> bool:  # type: ignore[override]
        """Whether there is anything to extrapolate."""
        return self.order > 0
