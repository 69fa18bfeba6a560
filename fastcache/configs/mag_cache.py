# SPDX-License-Identifier: Apache-2.0
"""MagCache's documented config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import flag, limit, real
from ..policies import Magnitude, Policy
from ..policies.magnitude import Calibrate, checked_ratios, resample
from ..predictors import Reuse
from ..recipe import Recipe, Rule
from ..targets.spec import Stack
from .base import BARE, Config


@dataclass
class MagCacheConfig(Config):
    """Skip all blocks while calibrated magnitude ratios promise little accumulated error.

    Args:
        threshold: accumulated error up to which steps are skipped, unitless, >= 0.
        max_skip_steps: longest row of skipped steps, a count.
        retention_ratio: share of the run that is computed at its start, 0 to 1.
        num_inference_steps: denoiser calls of a run per context, a count.
        mag_ratios: magnitude ratios, unitless, > 0, one per step, from `fastcache.calibrate`; another
            length is resampled to `num_inference_steps`. Kept as a one-dimensional floating tensor.
        calibrate: whether to compute every step and measure the ratios (see `cache.calibration`).
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range, or `mag_ratios` is missing; the message names it.
    Source: MagCache (arXiv 2506.09045), fields and defaults of diffusers 0.42.1.
    """

    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    num_inference_steps: int = 28
    mag_ratios: torch.Tensor | Sequence[float] | None = None
    calibrate: bool = False

    def validate(self) -> None:
        name = self._name()
        limit(name, "threshold", self.threshold)
        self._whole(0, "max_skip_steps")
        if real(name, "retention_ratio", self.retention_ratio, 0.0) > 1:
            raise ValueError(f"{name}: retention_ratio is {self.retention_ratio}, must be in 0..1")
        self._whole(1, "num_inference_steps")
        flag(name, "calibrate", self.calibrate)
        if self.mag_ratios is None:
            if not self.calibrate:
                raise ValueError(
                    f"{name}: mag_ratios is None; pass the ratios of your model (fastcache.calibrate measures "
                    "them, fastcache.FLUX_MAG_RATIOS are those published for Flux) or calibrate=True"
                )
            return
        values = self.mag_ratios
        if isinstance(values, torch.Tensor):
            if values.dim() != 1:
                raise ValueError(
                    f"{name}: mag_ratios has shape {tuple(values.shape)}, must be one-dimensional"
                )
            ratios = checked_ratios(name, values.tolist())
        else:
            ratios = checked_ratios(name, values)
            try:
                values = torch.tensor(values)  # the dtype that diffusers would give them
            except (TypeError, ValueError, RuntimeError):
                values = torch.tensor(
                    ratios
                )  # torch does not know this kind of number, such as a fraction
        if not values.dtype.is_floating_point:
            values = values.float()
        if len(ratios) != self.num_inference_steps and not self.calibrate:
            values = torch.tensor(
                resample(tuple(values.tolist()), self.num_inference_steps), dtype=values.dtype
            )
        self.mag_ratios = values

    def recipe(self) -> Recipe:
        self.validate()
        if self.calibrate:
            policy: Policy = Calibrate(**BARE)
        else:
            ratios: Any = self.mag_ratios
            policy = Magnitude(
                float(self.threshold),
                self.max_skip_steps,
                float(self.retention_ratio),
                self.num_inference_steps,
                tuple(ratios.tolist()),
                "float64" if ratios.dtype == torch.float64 else "float32",
                **BARE,
            )
        return Recipe.of((Rule(policy, Reuse(), Stack()),), self._name())


# Magnitude ratios of FLUX.1-dev at 28 steps as published by MagCache; source: diffusers 0.42.1.
FLUX_MAG_RATIOS = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047,
    1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484,
    0.95703, 0.93359, 0.89062,
)  # fmt: skip
