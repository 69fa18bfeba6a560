# SPDX-License-Identifier: Apache-2.0
"""The demo's last line: with a cache, more steps come nearer to the converged picture in less time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .metrics import psnr
from .sample import generate

CONVERGED = 200  # second-order steps that stand for the exact solution
BATCH = 4  # images
MORE = 50 / 28  # times as many steps, cached,
COMPUTED = 10 / 28  # of which so many, as a share of the usual ones, are computed
ROUNDS = 3  # timings of each


@dataclass(frozen=True)
class Nearer:
    """PSNR in dB to the converged picture, and the share of the usual run's time."""

    steps: int
    usual: float
    cached_steps: int
    computed: int
    cached: float
    share: float
    steps_at_that_time: int
    solvers: dict[str, float]  # without a cache, in that time

    def __str__(self) -> str:
        others = ", ".join(f"{name} {value:.1f}" for name, value in self.solvers.items())
        return (
            f"PSNR to the converged picture ({CONVERGED} second-order steps): {self.usual:.1f} dB with {self.steps} "
            f"Euler steps; {self.cached:.1f} with {self.cached_steps} second-order steps, {self.computed} of them "
            f"computed, in {self.share:.0%} of the time; with {self.steps_at_that_time} steps and no cache, which take "
            f"as long: {others}"
        )


def nearer(model: nn.Module, steps: int, seed: int) -> Nearer:
    """Measure it, for runs of `steps` steps."""
    import fastcache

    labels, more = torch.arange(BATCH) % 10, max(round(MORE * steps), 2)
    computed = max(round(COMPUTED * steps), 4)
    recipe = fastcache.Recipe(
        fastcache.Spread(computed / more, min(3, computed - 1)),
        fastcache.Guided(1, guide="modulated"),
    )

    def run(steps: int, solver: str, cache: Any = None) -> Tensor:
        return generate(model, labels, steps=steps, seed=seed, solver=solver, cache=cache)

    def cached() -> Tensor:
        with fastcache.enable(model, recipe) as cache:
            return run(more, "ab2", cache)

    exact = run(CONVERGED, "ab2")
    pairs = [(_timed(lambda: run(steps, "euler")), _timed(cached)) for _ in range(ROUNDS)]
    share = median(b[0] / a[0] for a, b in pairs)
    (_, usual), (_, made) = pairs[-1]
    same = max(round(share * steps + 0.5), 2)
    others = {
        name: psnr(run(same, solver), exact)
        for name, solver in (("AB2", "ab2"), ("UniPC", "unipc"), ("DPM-Solver++ 2M", "dpm++2m"))
    }
    counted = len(recipe.plan(more).computed)
    return Nearer(steps, psnr(usual, exact), more, counted, psnr(made, exact), share, same, others)


def _timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    made = run()
    return time.perf_counter() - start, made
