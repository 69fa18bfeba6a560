# SPDX-License-Identifier: Apache-2.0
"""Random traffic on one model, each picture held against the same request alone.

Requests arrive at random (Poisson), with recipes, steps, sizes and guidance of their own, and share batches; some are
given up half way, some calls raise, and those requests begin again. Nothing may be crossed, nothing lost, memory
stays flat.
"""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastcache
from fastcache.demo.data import NULL_LABEL, encode_labels, position_ids
from fastcache.demo.model import load_model
from fastcache.demo.sample import GUIDANCE, initial_noise, sigmas

from . import common
from .soak import GROWTH, resident

MOST = 8  # requests in a batch
SHARED = ("img_ids", "txt_ids")  # inputs that all samples have
EARLY = fastcache.Interval(4, phase=1, warmup=2, last=True)
RECIPES: dict[str, Any] = {
    "off": "off",
    "early": fastcache.Recipe(EARLY, fastcache.Taylor(2, skip_first=True)),
    "growing": fastcache.Recipe(fastcache.Growing(3), fastcache.Hermite(1)),
    "balanced": "balanced",
}
OPEN = 12  # requests at a time
# per call of the model: arrivals, and the chances that a client goes away and that the call raises
ARRIVALS, GOES, RAISES = 0.2, 0.01, 0.01
CROSSED = 1e-3  # of a picture in [-1, 1]: rounding is far below, another request's value far above


class Fault(RuntimeError):
    """Raised inside the model, on purpose."""


@dataclass(frozen=True)
class Order:
    """What a client asks for. size: image tokens."""

    label: int
    seed: int
    steps: int
    recipe: str
    guided: bool
    size: int

    @property
    def branches(self) -> tuple[str, ...]:
        return ("cond", "uncond") if self.guided else ("cond",)


@dataclass
class Served:
    """One request in service."""

    order: Order
    run: Any
    at: int = 0
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self) -> None:
        self.at, self.tokens = 0, initial_noise(1, seed=self.order.seed)[:, : self.order.size]

    def advance(self, velocity: Tensor) -> None:
        levels = sigmas(self.order.steps)
        if self.order.guided:
            cond, uncond = velocity.split(1)
            velocity = uncond + GUIDANCE * (cond - uncond)
        self.tokens = self.tokens + (levels[self.at + 1] - levels[self.at]) * velocity
        self.at += 1


def orders(seed: int) -> Any:
    """Random orders, of a set small enough that each is made alone once."""
    draw = random.Random(seed)
    while True:
        steps, size, recipe = draw.choice((6, 9)), draw.choice((16, 64)), draw.choice([*RECIPES])
        yield Order(draw.randrange(3), draw.randrange(2), steps, recipe, draw.random() < 0.5, size)


def advance(model: nn.Module, cache: fastcache.Cache, jobs: Sequence[Served]) -> None:
    """One step of requests of one size, in one batch."""
    calls = [(job, name) for job in jobs for name in job.order.branches]
    labels = [job.order.label if name == "cond" else NULL_LABEL for job, name in calls]
    text, pooled = encode_labels(torch.tensor(labels))
    image_ids, text_ids = position_ids()
    inputs = {
        "hidden_states": torch.cat([job.tokens for job, _ in calls]),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": torch.tensor([float(sigmas(job.order.steps)[job.at]) for job, _ in calls]),
        "img_ids": image_ids[: jobs[0].order.size],
        "txt_ids": text_ids,
        "return_dict": False,
    }
    contexts = [cache.context(name, step_index=job.at) for job, name in calls]
    runs = [job.run for job, _ in calls]
    found = fastcache.mixed_batch(model, contexts, inputs, shared=SHARED, runs=runs)[0]
    parts = found.split([len(job.order.branches) for job in jobs])
    for job, velocity in zip(jobs, parts, strict=True):
        job.advance(velocity)


class Alone:
    """The tokens of orders that nobody shares the model with, each made once."""

    def __init__(self) -> None:
        self.model = load_model()
        self.cache = fastcache.enable(self.model, "off")
        self.made: dict[Order, Tensor] = {}

    def __call__(self, order: Order) -> Tensor:
        if order not in self.made:
            recipe = RECIPES[order.recipe]
            with self.cache.run(num_inference_steps=order.steps, recipe=recipe) as run:
                job = Served(order, run)
                job.begin()
                run.pause()
                while job.at < order.steps:
                    advance(self.model, self.cache, [job])
                run.resume()
            self.made[order] = job.tokens
        return self.made[order]


@dataclass
class Found:
    """counts: of requests by what became of them, and of calls that raised. worst: difference from a request alone."""

    counts: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    readings: list[int] = field(default_factory=list)
    most_bytes: int = 0

    @property
    def lost(self) -> int:
        return self.counts["arrived"] - self.counts["served"] - self.counts["gone"]


@torch.no_grad()
def soak(goes_on: Callable[[Found], bool], seed: int = 0, every: int = 200) -> Found:
    """Serve until `goes_on` says no, then what is still open. every: calls between two readings of memory."""
    draw, found, alone, asked = random.Random(seed), Found(), Alone(), orders(seed)
    model, failing = load_model(), False

    def fail(*_: Any) -> None:
        if failing:
            raise Fault

    model.transformer_blocks[-1].register_forward_hook(fail)
    running: list[Served] = []

    def leave(job: Served, what: str) -> None:
        running.remove(job)
        job.run.resume()
        job.run.__exit__(None)
        found.counts[what] += 1

    with fastcache.enable(model, "off") as cache:
        for call in itertools.count(1):
            while goes_on(found) and len(running) < OPEN:
                if running and draw.random() > ARRIVALS:
                    break
                order = next(asked)
                recipe = RECIPES[order.recipe]
                run = cache.run(num_inference_steps=order.steps, recipe=recipe)
                run.__enter__()
                run.pause()
                running.append(Served(order, run))
                running[-1].begin()
                found.counts["arrived"] += 1
            if not running:
                break
            size = draw.choice(running).order.size
            jobs = [job for job in running if job.order.size == size][:MOST]
            failing = draw.random() < RAISES
            try:
                advance(model, cache, jobs)
            except Fault:
                found.counts["raised"] += 1
                for job in jobs:
                    job.begin()
            failing = False
            for job in jobs:
                if job.at == job.order.steps:
                    error = (job.tokens - alone(job.order)).abs().max().item()
                    found.worst = max(found.worst, error)
                    found.counts["crossed"] += error > CROSSED
                    leave(job, "served")
                elif draw.random() < GOES:
                    leave(job, "gone")
            if call % every == 0:
                gc.collect()
                cache.stats.clear()
                found.readings.append(resident())
                found.most_bytes = max(found.most_bytes, cache.nbytes())
    return found


def growth(readings: Sequence[int]) -> float:
    """Of the last quarter over the second one."""
    quarter = max(1, len(readings) // 4)
    before = statistics.median(readings[quarter : 2 * quarter] or readings)
    return statistics.median(readings[-quarter:]) / before - 1


def report(seconds: float, path: Path | None) -> int:
    """Serve for so long, say what was found; 0 where nothing is wrong."""
    end, last = time.monotonic() + seconds, [0.0]
    with common.bar(max(1, round(seconds)), "soak, s") as progress:

        def goes_on(found: Found) -> bool:
            now = time.monotonic()
            if now - last[0] > 1:
                progress.update(min(round(seconds - (end - now)), progress.total) - progress.n)
                last[0] = now
            return now < end

        found = soak(goes_on)
    grown = growth(found.readings) if len(found.readings) >= 8 else 0.0
    row = {
        "bench": "load soak",
        "minutes": seconds / 60,
        **dict(found.counts),
        "crossed": found.counts["crossed"],
        "lost": found.lost,
        "worst": found.worst,
        "growth": grown,
        "most_bytes": found.most_bytes,
        "readings": found.readings,
        **common.environment(),
    }
    shown = {
        k: row[k] for k in ("arrived", "served", "gone", "raised", "crossed", "lost") if k in row
    }
    print(", ".join(f"{k} {v}" for k, v in shown.items()))
    print(
        f"largest difference {found.worst:.1e}, memory {grown:+.2%} over {len(found.readings)} readings"
    )
    if path:
        common.write_lines(path, [row])
    return int(bool(found.counts["crossed"] or found.lost or grown > GROWTH))
