# SPDX-License-Identifier: Apache-2.0
"""Callers of every kind, made by a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from field_world import CALLS, FIRST, KINDS
from torch import Tensor

WIDTH = FIRST + CALLS


PROMPTS = ("cond", "uncond", "third")
BRANCHES = (
    ["cond"],
    ["cond"],
    ["cond", "uncond"],
    ["cond", "uncond"],
    ["uncond", "cond"],
    ["cond", "uncond", "third"],
    ["cond", "weaker"],
    ["cond", "uncond", "weaker"],
    ["window 0", "window 1", "window 2"],
)


@dataclass
class Loop:
    """One loop over timesteps. stop: step in which it ends early; how: by an exception "in" a call or "between"
    calls, or in "silence"."""

    steps: int
    stop: int
    how: str


@dataclass
class User:
    """One request, all its generations.

    announced: "nothing", by "run" or "pipeline". named: "nothing", branches by "name", or by "index" too, or
    "around" for one context around a step. lengths: whether the length of a run is told.
    """

    number: int
    announced: str
    named: str
    request: Any
    lengths: bool
    branches: list[str]
    conditions: str
    fresh_conditions: bool
    pauses: dict[str, tuple[int, int]]
    pauses_change: bool
    batches: dict[str, int]
    latents: str
    generations: list[list[Loop]]
    order: int
    dtypes: list[torch.dtype]
    experts: int


@dataclass
class Caller:
    """Everything that a seed has chosen."""

    seed: int
    kind: str
    works: bool
    place: str
    form: str
    rising: bool
    scale: float
    strength: float  # share of the way that is gone, as in image to image
    mode: str  # "alone", one user after the other; "threads" or "tasks": all at once
    tells: tuple[
        bool, bool, bool
    ]  # what pipelines tell: the scheduler's index, its timestep, their bars
    users: list[User]


def make(seed: int) -> Caller:
    """The caller of a seed."""
    rng = random.Random(seed)
    pick = rng.choice
    place = pick(["host", "device"])
    forms = ["view", "view of one", "expanded", "fresh", "fresh of one", "samples", "tokens"]
    mode = pick(["alone", "alone", "threads", "tasks"])
    users = [user(rng, i, mode) for i in range(pick([1, 1, 2]) if mode == "alone" else 2)]
    return Caller(
        seed=seed,
        kind=pick(list(KINDS)),
        works=rng.random() < 0.2,
        place=place,
        form=pick(forms + (["number"] if place == "host" else [])),
        rising=rng.random() < 0.25,
        scale=pick([1.0, 1000.0]),
        strength=pick([1.0, 1.0, 1.0, 0.5]),
        mode=mode,
        tells=pick(
            [(True, True, True), (True, False, True), (False, True, True), (True, True, False)]
        ),
        users=users,
    )


def user(rng: random.Random, number: int, mode: str) -> User:
    pick = rng.choice
    announced = pick(["nothing", "nothing", "run", "pipeline", "pipeline"])
    if announced == "pipeline" and (mode == "tasks" or (mode == "threads" and number)):
        announced = "run"  # a pipeline serves one call at a time, and gives way to no other task
    branches = pick(BRANCHES)
    order = 2 if rng.random() < 0.12 else 1
    named = pick(["nothing", "name", "index", "index", "around"])
    if order == 2 and named == "index":
        named = "name"  # there is no number for a second evaluation
    request = None
    if mode == "tasks" and announced == "nothing":
        named = "name" if named in ("nothing", "around") else named
        request = f"user {number}"
    longest = 12 // order if len(branches) < 3 else 8 // order
    generations = []
    for _ in range(rng.randrange(1, 4)):
        loops = []
        for _ in range(pick([1, 1, 1, 2])):
            steps = rng.randrange(1, longest)
            stop, how = steps, ""
            if rng.random() < 0.25:
                stop, how = rng.randrange(0, steps), pick(["in", "between", "silence"])
            loops.append(Loop(steps, stop, how))
            if how:
                break
        generations.append(loops)
    plain = torch.float32
    return User(
        number=number,
        announced=announced,
        named=named,
        request=request,
        lengths=rng.random() < 0.5,
        branches=branches,
        conditions=pick(["same", "same", "copies", "changing", "none"]),
        fresh_conditions=rng.random() < 0.5,
        pauses=pauses_of(branches, rng),
        pauses_change=rng.random() < 0.5,
        batches={n: pick([1, 1, 1, 2]) if rng.random() < 0.1 else 1 for n in branches},
        latents=pick(["new", "new", "copies", "in place"]),
        generations=generations,
        order=order,
        dtypes=[torch.bfloat16 if rng.random() < 0.1 else plain for _ in generations],
        experts=2 if announced == "pipeline" and rng.random() < 0.2 else 1,
    )


def pauses_of(branches: list[str], rng: random.Random) -> dict[str, tuple[int, int]]:
    """From which step to which a branch is left out; one at least never is."""
    pauses = {}
    for name in branches:
        if rng.random() < 0.2:
            begin = rng.randrange(0, 8)
            pauses[name] = (begin, begin + rng.randrange(1, 6))
    if len(pauses) == len(branches):
        pauses.pop(branches[0])
    return pauses


def times(steps: int, caller: Caller, rng: random.Random) -> list[float]:
    """The timesteps of a loop, from its first to its last."""
    uneven = rng.random() < 0.5
    strength = caller.strength
    shares = [(i / steps) ** (1.5 if uneven else 1.0) for i in range(steps)]
    shares = [1 - strength * (1 - s) for s in shares]
    falling = [round(caller.scale * (1 - s), 6) for s in shares]
    return [round(caller.scale - t, 6) for t in falling] if caller.rising else falling


def latents(user: User, dtype: torch.dtype, seed: int, at: int) -> Tensor:
    windows = 3 if user.branches[0].startswith("window") else 1
    rows = torch.arange(windows).float().reshape(1, windows, 1)
    return ((rows + (seed % 16) + at) / 32).expand(1, windows, WIDTH).to(dtype).contiguous()


def slice_of(shared: Tensor, name: str, user: User) -> Tensor:
    """The latents of a branch."""
    if name.startswith("window"):
        at = int(name[-1])
        shared = shared[:, at : at + 1]
    if user.latents == "copies":
        shared = shared.clone()
    batch = user.batches[name]
    return shared if batch == 1 else shared.expand(batch, *shared.shape[1:])
