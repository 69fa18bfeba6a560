# SPDX-License-Identifier: Apache-2.0
"""Export: the steps of a cached model as graphs of their own, for a host without Python.

A cached step only reads and writes storage that outlives it. In an exported graph that storage is an
argument, owned by whoever calls: hand the same tensors to every variant, and run the variant that the
schedule wants. What this step has to know (ring rows, weights) lies in small tensors among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.pipeline import denoisers_of
from ..policies import COMPUTE, REUSE
from ..recipe import Recipe, Rule
from ..runtime.context import Context
from ..runtime.denoiser import Denoiser
from ..runtime.patch import ATTACHED
from ..runtime.signature import call_signature
from ..runtime.steps import NEVER
from ..runtime.trip import Trip
from ..storage.history import Timeline, stage
from ..storage.state import State
from ..targets.control import WHOLE, Stop

STAGED = ("order", "row", "scale", "weights")  # of a history that holds more than one value


@dataclass
class Exported:
    """What `export_variants` returns: one program per action, and the storage they share.

    Call a program as `program.module()(cache, *args, **kwargs)`, an AOTInductor package alike; `cache` is
    a dict of tensors laid out as `buffers`, and a program writes into those it is given.
    """

    rule: Rule
    variants: dict[str, torch.export.ExportedProgram]
    buffers: dict[str, Tensor] = field(repr=False)  # as one computed step has left them

    def __getitem__(self, action: str) -> torch.export.ExportedProgram:
        return self.variants[action]

    def plan(
        self, steps: int, timesteps: Sequence[float] | None = None
    ) -> list[tuple[str, dict[str, Tensor]]]:
        """Per step of a run: the variant to call, and what to copy into its cache before the call.

        timesteps: of the run, as `Recipe.plan` takes them.
        """
        rule, timeline = self.rule, Timeline(self.rule.what.depth)
        cpu = torch.device("cpu")
        planned: list[tuple[str, dict[str, Tensor]]] = []
        for i, action in enumerate(Recipe.of([rule]).plan(steps, timesteps).rows[0]):
            reused = action == REUSE and rule.what.depth
            known = (steps,) if rule.what.per_run else ()
            weights: Any = rule.what.weights
            stage(timeline, weights(timeline.steps, i, *known) if reused else (), i, cpu)
            facts = {
                label: getattr(timeline.staged, label.rpartition(".")[2]).clone()
                for label in self.buffers
                if label.rpartition(".")[2] in STAGED
            }
            planned.append((action, facts))
            if action == COMPUTE or rule.what.feeds_back:
                timeline.push(i)
        return planned

    def fresh(self) -> dict[str, Tensor]:
        """Zeroed storage of its own, for another run or context."""
        return {name: torch.zeros_like(t) for name, t in self.buffers.items()}


class Variant(nn.Module):
    """The model's forward with its action and phase fixed and its storage given as an argument.

    In the head phase it returns what the rule decides by.
    """

    def __init__(self, denoiser: Denoiser, state: State, action: str, phase: str) -> None:
        super().__init__()
        self.model = denoiser.model
        self.held = (denoiser, state, action, phase)

    def forward(self, cache: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        denoiser, state, action, phase = self.held
        control = denoiser.control
        with Borrowed(state, cache):
            control.actions[:] = [action] * len(control.actions)
            control.phase = phase
            control.begin_step(denoiser.targets)
            try:
                return denoiser.original(*args, **kwargs)
            except Stop:
                return denoiser.targets[0].decider.left_by_head(state).clone()
            finally:
                control.end_step()


class Borrowed:
    """A state whose storage is, for the time being, what a caller has given."""

    def __init__(self, state: State, tensors: dict[str, Tensor]) -> None:
        self.slots = slots_of(state)
        self.tensors = tensors

    def __enter__(self) -> None:
        self.own = [held(owner, name) for _, owner, name in self.slots]
        for label, owner, name in self.slots:
            setattr(owner, name, self.tensors[label])

    def __exit__(self, *exc: object) -> None:
        for (_, owner, name), value in zip(self.slots, self.own, strict=True):
            setattr(owner, name, value)


def held(owner: Any, name: str) -> Tensor:
    """The tensor at a place that `slots_of` names."""
    return getattr(owner, name)


def slots_of(state: State) -> list[tuple[str, Any, str]]:
    """Where the tensors of a state hang, by name: histories, and what tells a step where it stands."""
    found: list[tuple[str, Any, str]] = []
    for i, (units, timeline) in enumerate(zip(state.units, state.timelines, strict=True)):
        for key, unit in units.items():
            for j, stream in enumerate(unit.streams):
                for name in stream.kept:
                    found.append((f"rule{i}.unit{key}.stream{j}", stream, name))
        if timeline.staged is not None and timeline.depth > 1:
            for name in STAGED:
                found.append((f"rule{i}.{name}", timeline.staged, name))
    for i, group in enumerate(state.slots):
        for label, keeper in group.owners(f"rule{i}"):
            found += [(f"{label}.{name}", keeper, name) for name in keeper.kept]
    return found


def export_variants(
    model: nn.Module, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None, **options: Any
) -> Exported:
    """Export the computed and the reused step of an enabled model, for rules that decide beforehand.

    The model keeps its cache; a run in it is not disturbed.

    Args:
        model: an nn.Module on which `fastcache.enable` was called.
        args, kwargs: an example call, by whose shapes, dtypes and devices storage is laid out.
        options: as for torch.export.export; strict is False unless given.

    Returns:
        The two programs, "compute" and "reuse", and the storage they share, as an `Exported`.

    Raises:
        ValueError: the model is not enabled, has several rules, decides inside its forward, or keeps values in
            another dtype than theirs.
    """
    denoiser = denoisers_of(model)[0][1].__dict__.get(ATTACHED)
    if denoiser is None:
        raise ValueError(
            "export_variants: model is not enabled; call fastcache.enable(model, config) first"
        )
    rules = denoiser.recipe.rules
    decided_inside = (
        denoiser.recipe.needs_signal
        or rules[0].what.guide is not None
        or rules[0].what.fitted is not None
        or rules[0].what.per_module
    )
    if denoiser.settings.cache_dtype is not None:
        raise ValueError(
            "export_variants: an exported cache keeps values as they are; leave cache_dtype out"
        )
    if decided_inside or denoiser.executor.wrappers or len(rules) > 1:
        raise ValueError(
            f"export_variants: {denoiser.recipe.name} has {len(rules)} rules or decides from values inside the "
            "step, so a host schedule of two variants cannot drive it; use one rule that decides beforehand, "
            "such as MagCacheConfig, TaylorSeerCacheConfig or Recipe(Interval(n), Taylor(2))"
        )
    args, kwargs = tuple(args), dict(kwargs or {})
    control = denoiser.control
    with denoiser.lock, torch.no_grad(), control.set_aside():
        denoiser.owner.hook()
        control.may_be_compiled = True
        state = recorded_state(denoiser, args, kwargs)
        buffers = {label: held(owner, name).clone() for label, owner, name in slots_of(state)}
        variants = {
            action: exported_part(denoiser, state, action, WHOLE, args, kwargs, **options)
            for action in (COMPUTE, REUSE)
        }
    return Exported(rules[0], variants, buffers)


def recorded_state(denoiser: Denoiser, args: tuple, kwargs: dict) -> State:
    """A state of its own, whose storage one computed step has allocated."""
    control = denoiser.control
    state = denoiser.pool.new((object(), "export"))
    state.fit(call_signature(args, kwargs))
    call = Context(None)
    state.trip = Trip(call.request)
    denoiser.decider.decide(state, denoiser.runs.step(state, call, None, NEVER), args, kwargs)
    denoiser.decider.upload(state)
    control.inside = True
    control.begin_step(denoiser.targets)
    denoiser.executor.record(args, kwargs)
    control.end_step()
    return state


def exported_part(
    denoiser: Denoiser,
    state: State,
    action: str,
    phase: str,
    args: tuple,
    kwargs: dict,
    **options: Any,
) -> torch.export.ExportedProgram:
    """One variant of a step, traced with a copy of the state's storage."""
    denoiser.control.state, denoiser.control.batch = state, "full"
    cache = {label: held(owner, name).clone() for label, owner, name in slots_of(state)}
    return torch.export.export(
        Variant(denoiser, state, action, phase),
        (cache, *args),
        kwargs,
        **{"strict": False, **options},
    )
