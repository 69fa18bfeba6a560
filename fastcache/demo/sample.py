"""Euler flow-matching sampler for the demo model, plain or under a cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .data import CHANNELS, IMAGE_TOKENS, NULL_LABEL, unpack
from .model import denoise

if TYPE_CHECKING:
    from fastcache import Cache

# the guidance scale of every guided number in this package
GUIDANCE = 2.5


def sigmas(steps: int) -> list[float]:
    """Noise levels from 1 down to 1/steps, then 0: [steps + 1]."""
    return [*torch.linspace(1.0, 1.0 / steps, steps).tolist(), 0.0]


def initial_noise(batch: int, seed: int) -> Tensor:
    """[batch, 64, 4], a function of its arguments only."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, IMAGE_TOKENS, CHANNELS, generator=generator)


@torch.no_grad()
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
) -> Tensor:
    """Images [B, 1, 16, 16] for labels [B], from the noise of `seed`.

    guidance: classifier-free guidance scale; None samples the conditional model alone.
    batched_guidance: both halves in one call, the unconditional one first.
    cache: every denoiser call runs inside its context, named "cond", "uncond" or "cond_uncond".
    progress: called with 1 after each step.
    """
    levels = sigmas(steps)
    tokens = initial_noise(len(labels), seed)

    def velocity(name: str, step: int, tokens: Tensor, labels: Tensor) -> Tensor:
        with _context(cache, name, step, steps, levels[step]):
            return denoise(model, tokens, torch.full((len(labels),), levels[step]), labels)

    for step in range(steps):
        if guidance is None:
            v = velocity("cond", step, tokens, labels)
        else:
            call = _both_halves if batched_guidance else _one_by_one
            cond, uncond = call(velocity, step, tokens, labels)
            v = uncond + guidance * (cond - uncond)
        tokens = tokens + (levels[step + 1] - levels[step]) * v
        if progress is not None:
            progress(1)
    return unpack(tokens)


Velocity = Callable[[str, int, Tensor, Tensor], Tensor]


def _one_by_one(
    velocity: Velocity, step: int, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    cond = velocity("cond", step, tokens, labels)
    return cond, velocity("uncond", step, tokens, torch.full_like(labels, NULL_LABEL))


def _both_halves(
    velocity: Velocity, step: int, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    both = torch.cat([torch.full_like(labels, NULL_LABEL), labels])
    uncond, cond = velocity("cond_uncond", step, torch.cat([tokens, tokens]), both).chunk(2)
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
