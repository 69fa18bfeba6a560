# SPDX-License-Identifier: Apache-2.0
"""A sampling loop written by hand, with guidance in two calls: the three lines that a cache needs.

    python examples/hand_loop.py --steps 28

The model is the one that fastcache ships; any nn.Module with a list of blocks takes its place.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from torch import Tensor, nn

import fastcache
from fastcache.demo.data import NULL_LABEL
from fastcache.demo.model import denoise, load_model
from fastcache.demo.sample import GUIDANCE, initial_noise, sigmas


@torch.no_grad()
def sample(model: nn.Module, cache: fastcache.Cache, label: int, steps: int) -> Tensor:
    """Euler's method from noise to a digit's latents [1, tokens, channels]."""
    tokens, levels = initial_noise(1, seed=0), sigmas(steps)
    with cache.run(num_inference_steps=steps):  # one generation, whatever the timesteps do
        for sigma, following in pairwise(levels):
            velocity = {}
            for branch, of in (("cond", label), ("uncond", NULL_LABEL)):
                with cache.context(branch):  # whose state a call uses
                    time = torch.full((1,), sigma)
                    velocity[branch] = denoise(model, tokens, time, torch.tensor([of]))
            guided = torch.lerp(velocity["uncond"], velocity["cond"], GUIDANCE)
            tokens = tokens + (following - sigma) * guided
    return tokens


def main(argv: list[str] | None = None) -> fastcache.Cache:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=28)
    p.add_argument("--label", type=int, default=3, help="a digit")
    args = p.parse_args(argv)
    model = load_model()
    with fastcache.enable(model, "balanced") as cache:  # attached to the model, and given back
        sample(model, cache, args.label, args.steps)
        print(cache.summary())
    return cache


if __name__ == "__main__":
    main()
