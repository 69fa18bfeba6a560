# SPDX-License-Identifier: Apache-2.0
"""SeaCache's documented config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import real
from ..policies import InputChange
from ..predictors import Reuse, Taylor
from ..recipe import Recipe, Rule
from ..targets.spec import Stack
from .base import BARE, Config


@dataclass
class SeaCacheConfig(Config):
    """Skip all blocks while the latents, without their noise, have changed little.

    Args:
        threshold: sum of relative changes up to which steps are skipped, unitless, >= 0.
        residual_order: order of the forecast of the residual, 0 or 1.
        retention_steps: steps that are computed at the start, a count.
        cache_end_steps: steps that are computed at the end of a run whose length is known, a count.
        max_consecutive_cached: longest row of skipped steps, a count; 0 sets no limit.
        power_exp: exponent of the spectrum that the latents are taken to have, > 0: 3 for video, 2 for images.
        raw_vision_callback: (model, args, kwargs) of a call -> its latents, each [C, T, H, W], or None for a call
            to compute; None: the model's first argument, [B, C, T, H, W] or [B, C, H, W].
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: SeaCache (arXiv 2602.18993), fields and defaults of diffusers 0.42.1.
    """

    threshold: float = 0.25
    residual_order: int = 1
    retention_steps: int = 1
    cache_end_steps: int = 1
    max_consecutive_cached: int = 2
    power_exp: float = 3.0
    raw_vision_callback: (
        Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], list[torch.Tensor] | None]
        | None
    ) = None

    def validate(self) -> None:
        real(self._name(), "threshold", self.threshold, 0.0)
        self._whole(0, "residual_order", high=1)
        self._whole(0, "retention_steps", "cache_end_steps", "max_consecutive_cached")
        if real(self._name(), "power_exp", self.power_exp) <= 0:
            raise ValueError(f"{self._name()}: power_exp is {self.power_exp}, must be > 0")
        self._callables("raw_vision_callback")

    def recipe(self) -> Recipe:
        self.validate()
        when = InputChange(
            self.threshold,
            at="model_input",
            power=self.power_exp,
            latents=self.raw_vision_callback,
            end_steps=self.cache_end_steps,
            warmup=self.retention_steps,
            max_skips=self.max_consecutive_cached,
            last=BARE["last"],
        )
        what = Taylor(1) if self.residual_order else Reuse()
        return Recipe.of((Rule(when, what, Stack(normed=True)),), self._name())
