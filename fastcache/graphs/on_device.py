# SPDX-License-Identifier: Apache-2.0
"""Experimental: FirstBlockCache's decision taken inside one graph, next to what is decided.

The graph holds the whole step: the first block and its change, the decision, and torch.cond over the rest of
the step, replayed or computed. Its three parts are exported with their storage as an argument, as
`export_variants` does it, and the host learns what was decided when a run ends or somebody looks at
`cache.stats`.

What waits is up to what runs the graph. Inductor writes the condition as an `if` of the host around a read of
the predicate (`pred.item()`), and captures no graph that has one, so there a step waits for the device once,
as it does without `on_device`, and cannot be had with `cudagraphs`. Only a runtime that captures torch.cond as
a conditional node decides without the host. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..policies import COMPUTE, REUSE, Decision, Policy, Run
from ..storage.allocate import allocate
from ..storage.state import State
from ..targets.control import HEAD, REST
from ..targets.decide import DecisionSlots
from .export import exported_part, held, recorded_state, slots_of

if TYPE_CHECKING:
    from ..runtime.denoiser import Denoiser


REASON = "decided on the device"


# What the device keeps of its decisions, see `DecisionSlots`, and what the exported parts call it.
KEPT = {"skips": ((1,), torch.int64), "must": ((1,), torch.bool), "seen": ((2,), torch.float64)}
LABEL = "rule0.decision"


def slots_to_decide(state: State, device: torch.device) -> DecisionSlots:
    """The slots of the only rule, allocated at their first use."""
    slots: DecisionSlots = state.slots[0].decision
    for name, (shape, dtype) in KEPT.items():
        if getattr(slots, name) is None:
            setattr(slots, name, allocate(shape, dtype, device))
    return slots


# Whether branches of torch.cond may write into storage.
WRITES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


def within(sums: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The largest relative change, [1] float64, and whether it and all others are within the threshold, [1].

    sums: [2] or per sample [B, 2], as `signal.relative_change` reads them. Anything not finite is not within.
    """
    change, size = sums.reshape(-1, 2).double().unbind(1)
    ratios = change / size
    small = ratios.isfinite() & (ratios <= threshold)
    return ratios.amax(0, keepdim=True), small.all(0, keepdim=True)


class OneStep(nn.Module):
    """A whole step of FirstBlockCache for calls of one signature."""

    def __init__(self, parts: dict[str, nn.Module], rule: Any) -> None:
        super().__init__()
        self.head, self.computed, self.reused = parts[HEAD], parts[COMPUTE], parts[REUSE]
        # no limit is a row longer than any run
        self.threshold, self.longest = rule.threshold, rule.max_skips or 2**62

    def forward(self, cache: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        sums = self.head(cache, *args, **kwargs)
        change, small = within(sums, self.threshold)
        skips = cache[f"{LABEL}.skips"]
        reuse = small & ~cache[f"{LABEL}.must"] & (skips < self.longest)
        skips.copy_(torch.where(reuse, skips + 1, 0))
        cache[f"{LABEL}.seen"].copy_(torch.cat([change, reuse.double()]))

        def replay() -> Any:
            return self.reused(cache, *args, **kwargs)

        def compute() -> Any:
            return self.computed(cache, *args, **kwargs)

        return torch.cond(reuse, replay, compute, ())


class OnDevice:
    """The steps of one denoiser, each as one graph; `compile` is what makes a callable of a module."""

    def __init__(self, denoiser: Denoiser, compile: Callable[[nn.Module], Callable]) -> None:
        if not WRITES:
            raise ValueError(
                f"compile: on_device=True needs torch 2.12 or later, here it is {torch.__version__}, where "
                "branches of torch.cond cannot write into the cache; leave on_device out"
            )
        self.rule: Any = rule_of(denoiser)
        self.denoiser, self.compile = denoiser, compile
        self.programs: dict[Any, Callable] = {}

    def run(self, state: State, args: tuple, kwargs: dict) -> Any:
        """One step whose storage exists and whose first block has a reference; nothing is read back."""
        denoiser, rule = self.denoiser, self.rule
        slots = slots_to_decide(state, state.slots[0].own.hidden.device)
        control = denoiser.control
        slots.must.fill_(bool(rule.must_compute(Run(), control.step)))
        program = self._program(state, args, kwargs)
        cache = {label: held(owner, name) for label, owner, name in slots_of(state)}
        with torch.no_grad():
            output = program(cache, args, kwargs)
        control.decisions[0] = Decision(REUSE, None, rule.threshold, REASON)
        control.actions[0] = REUSE
        return output

    def _program(self, state: State, args: tuple, kwargs: dict) -> Callable:
        leaves, spec = tree_flatten((args, kwargs))
        constants = tuple(None if isinstance(v, Tensor) else repr(v) for v in leaves)
        key = (state.signature, self.denoiser.executor.cuts, constants, str(spec))
        if key not in self.programs:
            module = OneStep(self._parts(args, kwargs), self.rule)
            self.programs[key] = self.compile(module)
        return self.programs[key]

    def _parts(self, args: tuple, kwargs: dict) -> dict[str, nn.Module]:
        """The parts of a step, exported from a state of their own."""
        denoiser = self.denoiser
        try:
            with denoiser.control.set_aside():
                return self._exported(args, kwargs)
        except Exception as error:
            raise RuntimeError(
                f"compile: on_device=True exports the model with torch.export, which cannot take "
                f"{denoiser.name} apart; leave on_device out. It said: {error}"
            ) from error

    def _exported(self, args: tuple, kwargs: dict) -> dict[str, nn.Module]:
        denoiser = self.denoiser
        state = recorded_state(denoiser, args, kwargs)
        state.slots[0].signal.kept_reference = True
        denoiser.targets[0].decider.prepare_head(state)
        slots_to_decide(state, state.slots[0].own.hidden.device)
        places = {HEAD: (COMPUTE, HEAD), COMPUTE: (COMPUTE, REST), REUSE: (REUSE, REST)}
        return {
            name: exported_part(denoiser, state, action, phase, args, kwargs).module(
                check_guards=False
            )
            for name, (action, phase) in places.items()
        }


def rule_of(denoiser: Denoiser) -> Policy:
    """The rule to decide by. Raises ValueError where a decision on the device cannot drive the recipe."""
    rules, settings = denoiser.recipe.rules, denoiser.settings
    when, what = rules[0].when, rules[0].what
    plain = what.depth == 1 and what.guide is None and not (what.table or what.feeds_back)
    if len(rules) > 1 or not (when.threshold_alone and plain):
        raise ValueError(
            f"compile: on_device=True is for FirstBlockCacheConfig alone, the model has {denoiser.recipe.name}; "
            "other methods need no decision there, leave on_device out"
        )
    for name, value in (
        ("process_group", settings.process_group),
        ("cache_dtype", settings.cache_dtype),
        ("max_bytes", settings.budget),
    ):
        if value is not None:
            raise ValueError(
                f"compile: on_device=True takes no {name}; leave it out of fastcache.enable"
            )
    return when
