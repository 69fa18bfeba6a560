"""Where a call belongs: which request, which branch of guidance, which run, and which of its steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..policies import Step
from ..recipe import Recipe
from ..storage.pool import Slots, follow
from ..storage.state import State
from ..targets.guidance import GuidanceTarget
from .branches import MOST, BranchDetector
from .context import IMPLICIT, Context
from .notices import LOG
from .settings import Settings
from .signature import call_signature
from .steps import StepTracker

# What calls without a context have in its place: the first branch of guidance, and those after it.
UNNAMED = (IMPLICIT, *(Context(None, f"default#{i + 1}") for i in range(1, MOST + 1)))


ALL: Any = object()  # every request


UNASKED: Any = object()  # nobody has asked yet what time it is


class Runs:
    """The runs of one denoiser."""

    def __init__(
        self,
        settings: Settings,
        model: nn.Module,
        recipe: Recipe,
        pool: Slots,
        guidance: GuidanceTarget | None,
    ) -> None:
        self.model, self.pool, self.guidance = model, pool, guidance
        self.callback = settings.timestep_callback
        self.steps = StepTracker(type(model).forward, settings.pipeline_ends_runs)
        self.branches = BranchDetector()
        totals = (getattr(rule.when, "num_inference_steps", None) for rule in recipe.rules)
        self.planned = next((n for n in totals if n), None)  # steps, as the recipe has it

    def unnamed(self, args: tuple, kwargs: dict) -> Context:
        """What stands for the context of a call without one: the first branch of guidance, or another one."""
        timestep = self.steps.argument(args, kwargs)
        named = {k: v for k, v in kwargs.items() if k != self.steps.name}
        latents = named.pop("hidden_states", args[0] if args else None)
        rest = [v for v in (*args, *named.values()) if v is not latents and v is not timestep]
        number = self.branches.of(latents, timestep, rest)
        if number and self.guidance is not None:
            raise ValueError(
                "target: the same latents came twice at one timestep, so guidance runs sequentially, and "
                "FasterCache's guidance half needs both halves in one batch; open cache.context('cond') "
                "and cache.context('uncond') around the calls, or set is_guidance_distilled=True"
            )
        return UNNAMED[number]

    def locate(
        self, call: Context, args: tuple, kwargs: dict, told: Any = UNASKED
    ) -> tuple[State, Step]:
        """The state that a call uses, and its step; a run begins where one has to.

        told: the timestep, where it was asked for before.
        """
        if self.guidance is not None or torch.is_grad_enabled():
            self.refuse(call)
        key = (call.request, call.name)
        state = self.pool.states.get(key) or self.pool.add(key)
        signature, steps = call_signature(args, kwargs), self.steps
        if told is UNASKED:
            told = call.timestep if self.callback is None else steps.told(call, self.callback)
        timestep = told if told is not None else steps.read(state, call, args, kwargs)
        if state.signature != signature:
            self.pool.adopt(state, signature)
        return state, self.step(state, call, timestep)

    def step(self, state: State, call: Context, timestep: float | None) -> Step:
        """The step that comes now in a state; another run begins there where this is its first."""
        if self.pool.streams:
            follow(state)
        index, anew = self.steps.index(state, call, timestep)
        if anew:
            self.pool.begin_anew(state)
        if not state.runs:
            state.total = call.num_inference_steps or self.planned
            LOG.debug("run of request %r, context %r begins", *state.key)
        elif call.num_inference_steps is not None:
            state.total = call.num_inference_steps
        state.armed_step, state.step_timestep = index, timestep
        if timestep is not None:
            state.timestep = timestep
        return Step(index, state.total, timestep, call.sigma)

    def refuse(self, call: Context) -> None:
        """Raise where a call cannot be cached: one of guidance that comes apart, or one that is trained on."""
        if self.guidance is not None:
            states = self.pool.states.values()
            began = {s.key[1] for s in states if s.index and s.key[0] == call.request}
            self.guidance.refuse({call.name, *began})
        training = torch.is_grad_enabled() and self.model.training
        if training and any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "target: the model is in training mode with gradients on; a cached step has no gradient. "
                "Call model.eval(), run under torch.no_grad(), or cache.disable() first"
            )

    def reset(self, request: Any = ALL) -> None:
        """Forget the runs of one request, or all; their storage serves the next ones."""
        for key in [k for k in self.pool.states if request is ALL or k[0] == request]:
            self.pool.forget(key)
        if request is ALL:
            self.steps.clear()
            self.branches.clear()


def abandon(pools: Iterable[Slots], request: Any) -> None:
    """Forget all contexts of a request: an exception passed through one of its calls."""
    for pool in pools:
        for key, state in pool.states.items():
            if key[0] == request:
                state.restart()
