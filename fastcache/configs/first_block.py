# SPDX-License-Identifier: Apache-2.0
"""FirstBlockCache's documented config."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import limit
from ..policies.first_block import FirstBlock
from ..predictors import Reuse
from ..recipe import Recipe, Rule
from ..targets.spec import Stack
from .base import BARE, Config


@dataclass
class FirstBlockCacheConfig(Config):
    """Skip the blocks after the first while its residual has changed by at most `threshold`.

    Args:
        threshold: relative L1 change of the first block's residual against that of the last computed
            step, unitless, >= 0; equality skips.
    Raises:
        TypeError: `threshold` is no number.
        ValueError: `threshold` is negative or NaN.
    Source: FirstBlockCache of diffusers 0.42.1, from ParaAttention; cf. TeaCache (arXiv 2411.19108).
    """

    threshold: float = 0.05

    def validate(self) -> None:
        limit(self._name(), "threshold", self.threshold)

    def recipe(self) -> Recipe:
        self.validate()
        return Recipe.of(
            (Rule(FirstBlock(float(self.threshold), **BARE), Reuse(), Stack()),), self._name()
        )
