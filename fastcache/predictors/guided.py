# SPDX-License-Identifier: Apache-2.0
"""Forecasts that take their weights from how the first block has moved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from ..checks import flag, real, whole
from .base import GuideName, Predictor
from .taylor import Taylor

PRIORS = {1: Taylor(1, "exact"), 2: Taylor(2, "exact", skip_first=True)}


@dataclass(frozen=True)
class Guided(Predictor):
    """Weights that would have predicted this step's guide from the guide's own history.

    The guide is a cheap value of every step. Its least-squares weights, computed on the device and never
    read by the host, are applied to the skipped value.

    Args:
        order: differences used, 1 to 3; order + 1 values are kept.
        guide: "residual" of the first block, which then runs on every step; "modulated", the
            normalised and timestep-modulated input of the first block; "input", what enters it.
            Each is [B, tokens, width]. "auto": "modulated" where the model's first block is known to have
            that, else "residual".
        ridge: pull toward the weights of a Taylor forecast, unitless, relative to the mean square
            of the guide's differences.
        tokens: every how many-th token the guide keeps, a count >= 1.
        max_misfit: relative norm of the unexplained part of the guide, unitless, above which the
            step after a reused one is computed; reads one number of the step before. None: no limit.
        early: whether two kept values are enough for a forecast, by their one difference; else steps are computed
            until there are order + 1. With a ridge of 0 it is then the prior's.
        prior: order of that Taylor forecast, 1 or 2, as far as `order` + 1 values allow, spacing "exact"; that of
            order 2 leaves out step 0, as `Taylor(2, "exact", skip_first=True)` does.
        checked: whether the weights are drawn toward that forecast's where it would have told the newest kept value
            better from the older ones; reads every `tokens`-th token of the kept values. Takes order 2 or 3.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range or no known guide; the message names it.
    Source: ours. Related: DiCache (one direction of a probe residual), TeaCache (the modulated input as
    a signal), dynamic mode decomposition.
    """

    order: int = 2
    guide: GuideName = "residual"
    ridge: float = 0.003
    tokens: int = 4
    max_misfit: float | None = None
    early: bool = False
    prior: int = 1
    checked: bool = False
    forecasts = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole("Guided", "order", self.order, 1, 3))
        if self.guide not in get_args(GuideName):
            raise ValueError(
                f"Guided: guide is {self.guide!r}, must be 'residual', 'modulated', 'input' or 'auto'"
            )
        object.__setattr__(self, "ridge", real("Guided", "ridge", self.ridge, 0.0))
        object.__setattr__(self, "tokens", whole("Guided", "tokens", self.tokens, 1))
        flag("Guided", "early", self.early)
        flag("Guided", "checked", self.checked)
        if self.checked and self.order < 2:
            raise ValueError(
                "Guided: checked is True, must be False with order 1: the older values say nothing of the newest"
            )
        object.__setattr__(self, "prior", whole("Guided", "prior", self.prior, 1, 2))
        if self.max_misfit is not None:
            object.__setattr__(
                self, "max_misfit", real("Guided", "max_misfit", self.max_misfit, 0.0)
            )

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Values kept."""
        return self.order + 1

    @property
    def needs(self) -> int:  # type: ignore[override]
        """Values without which nothing is forecast."""
        return 2 if self.early else self.depth

    def on_block(self, modulated: bool) -> Predictor:
        if self.guide != "auto":
            return self
        return replace(self, guide="modulated" if modulated else "residual")

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """What the ridge pulls toward: the weights that a Taylor forecast has on differences of the kept values.

        Args:
            steps: step indices of the kept values, newest first.
            step: index of the step to predict.
        Returns:
            `order` unitless weights, of the newest difference first.
        """
        like = PRIORS[self.prior]
        values = like.weights(steps[: min(like.depth, self.depth)], step)
        # the weights of the values are 1 in all: what the older ones have, a difference takes from the newer
        found = tuple(-sum(values[i:]) for i in range(1, len(values)))
        return (*found, *(0.0,) * (self.order - len(found)))
