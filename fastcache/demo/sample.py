# SPDX-License-Identifier: Apache-2.0
"""Flow-matching sampler for the demo model, plain or under a cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .data import CHANNELS, IMAGE_TOKENS, NULL_LABEL, unpack
from .model import denoise
from .solvers import SOLVERS, sigmas

if TYPE_CHECKING:
    from .. import Cache

__all__ = ["GUIDANCE", "generate", "initial_noise", "integrate", "sigmas"]

# the guidance scale of every guided number in this package
GUIDANCE = 2.5


def initial_noise(batch: int, seed: int) -> Tensor:
    """[batch, 64, 4], a function of its arguments only."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, IMAGE_TOKENS, CHANNELS, generator=generator)


def generate(
    model: nn.Module,
    labels: Tensor,
    *,
    steps: int = 28,
    seed: int = 0,
    guidance: float | None = None,
    batched_guidance: bool = False,
    cache: Cache | None = None,
    progress: Callable[[int], object] | None = None,
    dtype: torch.dtype = torch.float32,
    solver: str = "euler",
) -> Tensor:
    """Images [B, 1, 16, 16] for labels [B], from the noise of `seed`.

    guidance: classifier-free guidance scale; None samples the conditional model alone.
    batched_guidance: both halves in one call, the unconditional one first.
    cache: every denoiser call runs inside its context, named "cond", "uncond" or "cond_uncond".
    progress: called with 1 after each step.
    dtype: what the model is called in; the image itself is kept in fp32 between the steps.
    solver: a name in `fastcache.demo.solvers.SOLVERS`.
    """
    noise, call = initial_noise(len(labels), seed), partial(denoise, model)
    options = (steps, guidance, batched_guidance, cache, progress, dtype, solver)
    return unpack(integrate(call, noise, labels, *options))


@torch.no_grad()
def integrate(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],  # latents, sigma [B], labels [B]
    latents: Tensor,
    labels: Tensor,
    steps: int = 28,
    guidance: float | None = None,
    batched_guidance: bool = False,
    cache: Cache | None = None,
    progress: Callable[[int], object] | None = None,
    dtype: torch.dtype = torch.float32,
    solver: str = "euler",
    null: int = NULL_LABEL,
) -> Tensor:
    """From noise to clean latents of any shape [B, ...]; options as in `generate`.

    null: the label that stands for none.
    """
    solve = SOLVERS[solver](steps)
    levels = solve.levels

    def velocity(name: str, step: int, latents: Tensor, labels: Tensor) -> Tensor:
        with _context(cache, name, step, steps, levels[step]):
            sigma = torch.full((len(labels),), levels[step])
            return denoise(latents.to(dtype), sigma, labels)

    for step in range(steps):
        if guidance is None:
            v = velocity("cond", step, latents, labels)
        else:
            call = _both_halves if batched_guidance else _one_by_one
            cond, uncond = call(velocity, step, latents, labels, null)
            v = uncond + guidance * (cond - uncond)
        latents = solve.step(step, latents, v)
        if progress is not None:
            progress(1)
    return latents


Velocity = Callable[[str, int, Tensor, Tensor], Tensor]


def _one_by_one(
    velocity: Velocity, step: int, latents: Tensor, labels: Tensor, null: int
) -> tuple[Tensor, Tensor]:
    cond = velocity("cond", step, latents, labels)
    return cond, velocity("uncond", step, latents, torch.full_like(labels, null))


def _both_halves(
    velocity: Velocity, step: int, latents: Tensor, labels: Tensor, null: int
) -> tuple[Tensor, Tensor]:
    both = torch.cat([torch.full_like(labels, null), labels])
    uncond, cond = velocity("cond_uncond", step, torch.cat([latents, latents]), both).chunk(2)
    return cond, uncond


def _context(
    cache: Cache | None, name: str, step: int, steps: int, sigma: float
) -> AbstractContextManager[object]:
    if cache is None:
        return nullcontext()
    # timesteps run from 1000 down to 0, as in diffusers; the model itself takes sigma
    return cache.context(
        name, step_index=step, num_inference_steps=steps, timestep=1000 * sigma, sigma=sigma
    )
