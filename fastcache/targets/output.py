# SPDX-License-Identifier: Apache-2.0
"""Skipping the whole model: what it returns is predicted from what it returned before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import sync
from ..models.block_io import model_input
from ..policies import REUSE
from ..storage.state import State
from ..storage.unit import Unit
from .base import Binding, BoundTarget
from .outputs import rebuilt, template_of, tensors
from .spec import Output


class Form(NamedTuple):
    """How a model returns its tensors.

    kind: a dataclass that is no dict, None otherwise. template: of its fields, or of the return.
    """

    kind: type | None
    template: Any


def taken_apart(output: Any) -> tuple[Form, list[Tensor]]:
    """How a model has returned its tensors, and those in order."""
    if not is_dataclass(output) or isinstance(output, dict):
        template = template_of(output)
        return Form(None, template), list(tensors(template, output))
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    template = template_of(values)
    return Form(type(output), template), list(tensors(template, values))


def put_together(form: Form, values: list[Tensor]) -> Any:
    """These tensors as a model returns them."""
    output = rebuilt(form.template, values)
    return output if form.kind is None else form.kind(**output)


def latents_of(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors among a call's input latents: one, or one per sample."""
    given = model_input(args, kwargs)
    return [
        v for v in (given if isinstance(given, list | tuple) else (given,)) if torch.is_tensor(v)
    ]


def alike(y: Tensor, x: Tensor) -> bool:
    """Whether a difference of the two can be kept."""
    return y.is_floating_point() and (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


class OutputTarget(BoundTarget):
    """The output of one model, bound to one rule of a recipe. A unit's template is (form, whether each stream holds
    a difference)."""

    wraps = True

    def __init__(self, binding: Binding, where: Output) -> None:
        super().__init__(binding.part)
        self.make_store = binding.make_store
        self.writes_latents = (
            False  # the model writes into what it is given, so copies of that are kept
        )

    def hooked(self) -> list[str]:
        return ["the model's output"]

    @property
    def layout_key(self) -> tuple:
        return (self.writes_latents,)

    def around(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        state: State = self.control.state
        unit = state.units[self.rule].get(0)
        latents = latents_of(args, kwargs)
        if self.control.actions[self.rule] == REUSE and unit is not None:
            return self._predicted(unit, latents)
        given = latents
        if unit is None or self.writes_latents:
            given = [x.clone() for x in latents]
        output = run(*args, **kwargs)
        form, values = taken_apart(output)
        if unit is None:
            self.writes_latents = not all(map(sync.same, given, latents))
        if unit is None or len(values) != len(unit.streams):
            unit = state.units[self.rule][0] = self._unit(state, form, values, given)
        elif form != unit.template[0]:  # by an argument of the call, such as return_dict
            unit.template = (form, unit.template[1])
        self._store(state, unit, values, given)
        return output

    def _unit(self, state: State, form: Form, values: list[Tensor], latents: list[Tensor]) -> Unit:
        """Storage for what the model has returned."""
        if not values:
            raise ValueError(
                "target: Output() found no tensor in what the model returns, so there is nothing to reuse"
            )
        unit, timeline = Unit(), state.timelines[self.rule]
        differs = [i < len(latents) and alike(y, latents[i]) for i, y in enumerate(values)]
        unit.template = (form, differs)
        unit.streams = [self.make_store(y.detach(), timeline) for y in values]
        for stream in unit.streams:
            stream.hand_out_copies = True  # callers keep an output for longer than a step
        return unit

    def _store(self, state: State, unit: Unit, values: list[Tensor], latents: list[Tensor]) -> None:
        """Keep what the model has returned. Traced by torch.compile(model)."""
        step = 0 if torch.compiler.is_compiling() else state.armed_step
        for i, differs in enumerate(unit.template[1]):
            x = latents[i].detach() if differs else None
            unit.streams[i].store(values[i].detach(), x, step)
        unit.touched = True

    def _predicted(self, unit: Unit, latents: list[Tensor]) -> Any:
        """What the model would return. Traced by torch.compile(model)."""
        control = self.control
        weights = () if torch.compiler.is_compiling() else control.weights[self.rule]
        form, differing = unit.template
        values = []
        for i, differs in enumerate(differing):
            base = latents[i].detach() if differs else None
            value = unit.streams[i].predict(base, weights)
            if base is None and control.batch == "half":  # the conditional half comes last
                value = value[value.shape[0] // 2 :]
            values.append(value)
        return put_together(form, values)
