# SPDX-License-Identifier: Apache-2.0
"""TeaCache by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import flag, limit
from ..policies import InputChange
from ..policies.coefficients import published
from ..policies.input_change import checked_coefficients
from ..predictors import Reuse
from ..recipe import Recipe, Rule
from ..targets.spec import Stack
from .base import BARE, Config


@dataclass
class TeaCacheConfig(Config):
    """Skip all blocks while the first one's modulated input promises little change of the output.

    Args:
        threshold: sum up to which steps are skipped, unitless, >= 0. FLUX: 0.25 for 1.5 times the speed, 0.4 for
            1.8, 0.6 for 2.0, 0.8 for 2.25; Wan 2.1: 0.05 to 0.2.
        coefficients: of the polynomial from the change of the input to that of the output, highest power first,
            unitless: numbers, or a row of `fastcache.policies.coefficients.PUBLISHED` such as "wan2.1-t2v-14b".
            None takes those published for the class of the model; (1, 0) is the change itself.
        num_inference_steps: denoiser calls of a run per context, a count; None: as the context tells.
        retention_steps: steps that are computed at the start, a count.
        last: whether the last step is computed, in runs whose length is known.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range, or nothing is known of this name; the message names it.
    Source: TeaCache (arXiv 2411.19108), github.com/ali-vilab/TeaCache @ 7c10efc.
    """

    threshold: float = 0.25
    coefficients: Sequence[float] | str | None = None
    num_inference_steps: int | None = None
    retention_steps: int = 1
    last: bool = True

    def validate(self) -> None:
        limit(self._name(), "threshold", self.threshold)
        self._numbers()
        self._whole(1, "num_inference_steps", optional=True)
        self._whole(0, "retention_steps")
        flag(self._name(), "last", self.last)

    def _numbers(self) -> tuple[float, ...] | None:
        """The coefficients themselves; None where the model's class tells."""
        given = self.coefficients
        if given is None:
            return None
        if isinstance(given, str):
            return published(self._name(), given)
        return checked_coefficients(self._name(), given)

    def recipe(self) -> Recipe:
        self.validate()
        guards = {**BARE, "warmup": self.retention_steps, "last": self.last}
        when = InputChange(
            self.threshold,
            self._numbers(),
            num_inference_steps=self.num_inference_steps,
            **guards,
        )
        return Recipe.of((Rule(when, Reuse(), Stack()),), self._name())
