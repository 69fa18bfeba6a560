# SPDX-License-Identifier: Apache-2.0
"""Solvers for the demo models: Euler, the second-order Adams-Bashforth, and diffusers' multistep schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from . import require


def sigmas(steps: int) -> list[float]:
    """Noise levels from 1 down to 1/steps, then 0: [steps + 1]."""
    return [*torch.linspace(1.0, 1.0 / steps, steps).tolist(), 0.0]


class Solver(Protocol):
    """One run from noise to latents: the noise levels at which the model is called, and 0; and its steps."""

    levels: list[float]

    def step(self, i: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """Latents at level i + 1, from those at level i and the velocity there."""
        ...


class Euler:
    """First order."""

    def __init__(self, steps: int) -> None:
        self.levels = sigmas(steps)

    def step(self, i: int, latents: Tensor, velocity: Tensor) -> Tensor:
        return latents + (self.levels[i + 1] - self.levels[i]) * velocity


class AdamsBashforth:
    """Second order, from the velocities of this step and the one before; the first step is Euler's."""

    def __init__(self, steps: int) -> None:
        self.levels = sigmas(steps)
        self.before: Tensor | None = None

    def step(self, i: int, latents: Tensor, velocity: Tensor) -> Tensor:
        length = self.levels[i + 1] - self.levels[i]
        before, self.before = self.before, velocity
        if before is not None:
            ratio = length / (self.levels[i] - self.levels[i - 1])
            velocity = velocity + ratio / 2 * (velocity - before)
        return latents + length * velocity


class Multistep:
    """A scheduler of diffusers on its own noise levels for flow matching.

    name: UniPCMultistepScheduler or DPMSolverMultistepScheduler, both of second order as they come.
    """

    def __init__(self, name: str, steps: int) -> None:
        require("diffusers")
        import diffusers

        made: Any = getattr(diffusers, name)
        self.multistep = made(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
        )
        self.multistep.set_timesteps(steps)
        self.levels = self.multistep.sigmas.tolist()

    def step(self, i: int, latents: Tensor, velocity: Tensor) -> Tensor:
        time = self.multistep.timesteps[i]
        stepped: Tensor = self.multistep.step(velocity, time, latents, return_dict=False)[0]
        return stepped


SOLVERS: dict[str, Callable[[int], Solver]] = {
    "euler": Euler,
    "ab2": AdamsBashforth,
    "unipc": lambda steps: Multistep("UniPCMultistepScheduler", steps),
    "dpm++2m": lambda steps: Multistep("DPMSolverMultistepScheduler", steps),
}
