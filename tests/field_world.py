# SPDX-License-Identifier: Apache-2.0
"""A model whose outputs say which calls they were made of, and a judge who knows whose calls those are.

The residual of computed call n is 1 in place n and 0 elsewhere, so the difference of a call's output and its input
is the weights of the values that it was made of: its own number alone where it computed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcache import (
    FirstBlock,
    Interval,
    Magnitude,
    Mask,
    Recipe,
    Reuse,
    Taylor,
    TimestepRange,
)
from fastcache.policies import COMPUTE, REUSE, Policy, Step

CALLS = 384  # of one caller, at most
# places that hold no call: what the first block adds, a value that bfloat16 rounds, the work between the blocks
TICK, FINE, WORK, FIRST = 0, 1, 2, 3
EXACT = 1 + 2.0**-12


class OnDevice(Tensor):
    """A tensor that says that it lies on an accelerator."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def far(value: Any) -> Any:
    return Tensor._make_subclass(OnDevice, value) if isinstance(value, Tensor) else value


class Interrupted(Exception):
    """What ends a run of a caller that is stopped."""


class First(nn.Module):
    """Runs also where the decision falls after it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        out = hidden_states.clone()
        out[..., TICK] += 1
        return out


class Number(nn.Module):
    """Writes down which call it is."""

    now = 0  # call
    fails = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.fails:
            raise Interrupted
        out = hidden_states.clone()
        out[..., self.now] += 1
        out[..., FINE] += EXACT
        return out


class Model(nn.Module):
    """Two blocks. works: whether something happens between them."""

    def __init__(self, works: bool) -> None:
        super().__init__()
        self.blocks, self.works = nn.ModuleList([First(), Number()]), works
        self.numbered = self.blocks[1]
        self.eval()

    def forward(
        self, hidden_states: Tensor, timestep: Any = None, encoder_hidden_states: Any = None
    ) -> Tensor:
        hidden = hidden_states.as_subclass(Tensor)
        for i, block in enumerate(self.blocks):
            if i and self.works:
                hidden = hidden.clone()
                hidden[..., WORK] += 1
            hidden = block(hidden)
        return hidden


class Kind(NamedTuple):
    """A recipe, and how many steps ago a value that it reuses may have been computed."""

    recipe: Recipe
    oldest: float
    timed: bool = False  # it has to know the timestep


GUARDS = {"warmup": 0, "last": False}
KINDS = {
    "Interval": Kind(Recipe(Interval(3, **GUARDS), Reuse()), 2),
    "Interval, last": Kind(Recipe(Interval(2, warmup=2, last=True), Reuse()), 1),
    "Interval, Taylor": Kind(Recipe(Interval(3, warmup=2, last=False), Taylor(1)), 2),
    "Mask": Kind(Recipe(Mask([1, 0, 0, 1, 1, 0] * 4, **GUARDS), Reuse()), 2),
    "Mask, Taylor": Kind(Recipe(Mask([1, 1, 0, 0, 0, 1, 0] * 3, **GUARDS), Taylor(1)), 3),
    "Magnitude": Kind(
        Recipe(
            Magnitude(
                threshold=9.0,
                max_skip_steps=3,
                retention_ratio=0.0,
                num_inference_steps=8,
                mag_ratios=[1.0] * 8,
                **GUARDS,
            ),
            Reuse(),
        ),
        3,
    ),
    "TimestepRange": Kind(Recipe(TimestepRange(2, (0.05, 900), **GUARDS), Reuse()), 1, True),
    "FirstBlock": Kind(Recipe(FirstBlock(1e6, **GUARDS), Reuse()), math.inf),
    "FirstBlock, max_skips": Kind(Recipe(FirstBlock(1e6, max_skips=3, **GUARDS), Reuse()), 3),
    "FirstBlock, Taylor": Kind(
        Recipe(FirstBlock(1e6, max_skips=2, warmup=2, last=False), Taylor(1)), 2
    ),
}


class Truth(NamedTuple):
    """Whose call it is.

    key: request, run, branch and model. step: of the schedule. planned: whether all of this was announced, so that
    the call has to do what its policy plans. total: steps that were announced. time: that the policy may know of.
    """

    key: Hashable
    step: int
    planned: bool = False
    total: int | None = None
    time: float | None = None


class Ideal:
    """What a policy does in a run whose every step it knows."""

    def __init__(self, kind: Kind, total: int | None) -> None:
        self.kind, self.when = kind, kind.recipe.rules[0].when
        self.run = self.when.begin(total)
        self.computed: list[int] = []
        self.step, self.action = -1, COMPUTE

    def acts(self, truth: Truth) -> str:
        policy: Policy = self.when
        if truth.step == self.step and not policy.needs_signal:
            return self.action
        again = truth.step == self.step
        self.step = truth.step
        step = Step(truth.step, truth.total, truth.time, again=again)
        self.action = policy.decide(self.run, step, 0.0 if self.computed else None).action
        if self.action == REUSE:
            if self.computed and truth.step - self.computed[-1] <= self.kind.oldest:
                return REUSE
            policy.computed(self.run, step)
        self.action = COMPUTE
        self.computed.append(truth.step)
        return COMPUTE


@dataclass
class World:
    """Models under a cache, whoever calls them, and what was found."""

    kind: Kind
    works: bool = False
    faults: list[str] = field(default_factory=list)
    calls: int = 0
    reused: int = 0
    planned: int = 0

    def __post_init__(self) -> None:
        self.models = [Model(self.works), Model(self.works)]
        self.truths: list[Truth] = []
        self.ideals: dict[Hashable, Ideal] = {}
        self.log: list[str] = []

    def call(
        self, truth: Truth, given: dict[str, Any], which: int = 0, fails: bool = False
    ) -> None:
        """One call of a model, judged."""
        number = FIRST + len(self.truths)
        self.truths.append(truth)
        self.calls += 1
        numbered = self.models[which].numbered
        numbered.now, numbered.fails = number, fails
        x = given["hidden_states"].as_subclass(Tensor).clone()
        try:
            out = self.models[which](**given)
        except Interrupted:
            self.log.append(f"{number}: {truth} failed")
            raise
        finally:
            numbered.fails = False
        self.judge(number, truth, out, x)

    def judge(self, number: int, truth: Truth, out: Tensor, x: Tensor) -> None:
        if out.shape != x.shape or out.dtype != x.dtype:
            self.fault(number, f"{out.shape} {out.dtype} in place of {x.shape} {x.dtype}")
            return
        change = (out.float() - x.float()).reshape(-1, out.shape[-1])
        if change.shape[0] > 1 and not torch.equal(change, change[:1].expand_as(change)):
            self.fault(number, "samples differ")
        row = change[0]
        places = (row[FIRST:].abs() > 1e-3).nonzero().flatten().tolist()
        weights = {FIRST + at: float(row[FIRST + at]) for at in places}
        computed = weights == {number: 1.0}
        self.log.append(f"{number}: {truth} {'computed' if computed else weights}")
        tolerance = 1e-5 if out.dtype == torch.float32 else 0.05
        fixed = {"tick": (TICK, 1.0), "value": (FINE, EXACT), "work": (WORK, float(self.works))}
        for what, (place, right) in fixed.items():
            if abs(float(row[place]) - right) > tolerance:
                self.fault(number, f"{what} is {float(row[place])}, not {right}")
        if not computed:
            self.reused += 1
            self.judge_sources(number, truth, weights, tolerance)
        ideal = self.ideals.get(truth.key)
        if ideal is None:
            ideal = self.ideals[truth.key] = Ideal(self.kind, truth.total)
        action = ideal.acts(truth)
        if truth.planned:
            self.planned += 1
            if computed != (action == COMPUTE):
                self.fault(number, f"planned to {action}")

    def judge_sources(
        self, number: int, truth: Truth, weights: dict[int, float], tolerance: float
    ) -> None:
        """What was reused has to be of the same run, recent, and weighed by where it lies."""
        steps = {}
        for source, weight in weights.items():
            if source >= number:
                self.fault(number, f"is made of {weights}")
                return
            of = self.truths[source - FIRST]
            if of.key != truth.key:
                self.fault(number, f"is made of {source}, which is of {of.key}")
                return
            steps[of.step] = weight
        if not steps:
            self.fault(number, "is made of nothing")
            return
        newest, *older = sorted(steps, reverse=True)
        age = truth.step - newest
        if not 0 <= age <= self.kind.oldest:
            self.fault(number, f"a value {age} steps old")
        right = {newest: 1.0}
        if older:
            ratio = age / (newest - older[0])
            right = {newest: 1 + ratio, older[0]: -ratio}
        if any(abs(steps[s] - right.get(s, 0.0)) > tolerance for s in steps):
            self.fault(number, f"weights by step {steps}, not {right}")

    def fault(self, number: int, what: str) -> None:
        self.faults.append(f"call {number}, {self.truths[number - FIRST]}: {what}")
