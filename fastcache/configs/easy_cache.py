# SPDX-License-Identifier: Apache-2.0
"""EasyCache by its name."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import limit
from ..policies import OutputSlope
from ..policies.output_slope import checked_share
from ..predictors import Reuse
from ..recipe import Recipe, Rule
from ..targets.spec import Output
from .base import BARE, Config


@dataclass
class EasyCacheConfig(Config):
    """Skip steps while the output, as it has changed with the latents so far, can have changed only little.

    Args:
        threshold: sum of expected relative changes up to which steps are skipped, unitless, >= 0.
        warmup: steps that are computed at the start, a count.
        token_stride: every how many-th token (of pictures: pixel) is looked at, a count >= 1.
        start, stop: shares of a run's steps between which steps may be skipped, 0 <= start < stop <= 1; other than
            0 and 1 they need a run whose length is known.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: EasyCache (arXiv 2507.02860); threshold, warm-up and stride of SGLang, the shares of ComfyUI.
    """

    threshold: float = 0.1
    warmup: int = 3
    token_stride: int = 8
    start: float = 0.0
    stop: float = 1.0

    def validate(self) -> None:
        limit(self._name(), "threshold", self.threshold)
        self._whole(0, "warmup")
        self._whole(1, "token_stride")
        checked_share(self._name(), self.start, self.stop)

    def recipe(self) -> Recipe:
        self.validate()
        guards = {**BARE, "warmup": self.warmup}
        when = OutputSlope(self.threshold, self.token_stride, self.start, self.stop, **guards)
        return Recipe.of((Rule(when, Reuse(), Output()),), self._name())
