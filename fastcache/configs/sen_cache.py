# SPDX-License-Identifier: Apache-2.0
"""SenCache by its name."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import limit, real
from ..policies import Sensitivity
from ..predictors import Reuse
from ..recipe import Recipe, Rule
from ..targets.spec import Stack
from .base import BARE, Config


@dataclass
class SenCacheConfig(Config):
    """Skip all blocks while latents and timestep are near those of the last computed step.

    Near is alpha_x |x - x'| + alpha_t |t - t'| <= threshold, |.| the L2 norm.

    Args:
        threshold: of the weighted distance, in the unit that the alphas give it, >= 0.
        alpha_x: sensitivity of the output to the latents, per unit of their L2 norm, >= 0.
        alpha_t: sensitivity of the output to time, per unit of the timestep in the model's scale, >= 0.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: SenCache (arXiv 2602.24208), from the paper.
    """

    threshold: float
    alpha_x: float
    alpha_t: float
    wants_timestep = True

    def validate(self) -> None:
        limit(self._name(), "threshold", self.threshold)
        for name in ("alpha_x", "alpha_t"):
            real(self._name(), name, getattr(self, name), 0.0)

    def recipe(self) -> Recipe:
        self.validate()
        when = Sensitivity(self.threshold, self.alpha_x, self.alpha_t, **BARE)
        return Recipe.of((Rule(when, Reuse(), Stack()),), self._name())
