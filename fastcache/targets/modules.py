# SPDX-License-Identifier: Apache-2.0
"""Skipping chosen modules: their outputs are predicted instead of being computed.

A module takes part by a subclass assigned to its `__class__`, so its hooks, parameters, name and
compiled graphs stay its own; modules of one class share one subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..policies import COMPUTE, REUSE
from ..storage.allocate import Unfit, allocate, static, upload
from ..storage.history import padded
from ..storage.state import State
from ..storage.unit import Unit
from .base import BoundTarget
from .decide import Part
from .install import hooked_class, put_back, refuse_copy
from .outputs import rebuilt, template_of, tensors

NODE = "_fastcache_node"


def entry_of(args: tuple, kwargs: dict) -> Any:
    """The shape of a module's first argument."""
    for value in args or kwargs.values():
        return value.shape if isinstance(value, Tensor) else None
    return None


class Caching:
    """Mixed into the class of a module while a cache is attached to it."""

    __reduce_ex__ = refuse_copy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        node = self.__dict__.get(NODE)
        if node is None:  # a copy of the module without its cache
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        run = node.forward if node.forward is not None else super().forward  # type: ignore[misc]
        if not node.target.control.active:
            return run(*args, **kwargs)
        return node.target.call(node, run, args, kwargs)


class Node:
    """One hooked module: its place in the state, and the forward that an outer library had put on it."""

    __slots__ = ("forward", "key", "module", "name", "target", "unit", "weights")

    def __init__(self, target: ModulesTarget, key: int, name: str, module: nn.Module) -> None:
        self.target, self.key, self.name, self.module = target, key, name, module
        self.forward: Callable | None = None
        self.unit: Unit | None = None  # its place in the state of the running call
        self.weights: Tensor | None = None  # its own, on the device, for compiled code


class ModulesTarget(BoundTarget):
    """The chosen modules of one model, bound to one rule of a recipe."""

    def __init__(
        self,
        part: Part,
        modules: list[tuple[str, nn.Module]],
        make_store: Callable[[Tensor, Any], Any],
        conditional_half: bool = False,
    ) -> None:
        predictor = part.what
        super().__init__(part, weighted=not predictor.per_module)
        self.predictor, self.make_store = predictor, make_store
        # of one module, where they differ: the values' steps, the running step, the module -> weights
        self.weigh: Callable[..., tuple[float, ...]] = predictor.weights
        self.nodes = [Node(self, key, name, module) for key, (name, module) in enumerate(modules)]
        self.per_module = predictor.per_module
        # keep only the second half of a full guidance batch
        self.conditional_half = conditional_half
        # the modules' own weights on the device, a row each, and as numbers: for compiled code
        self.table: Tensor | None = None
        self.told: list[list[float]] = []

    def install(self) -> None:
        for node in self.nodes:
            module = node.module
            node.forward = module.__dict__.pop("forward", None)
            module.__dict__[NODE] = node
            module.__class__ = hooked_class(type(module), Caching)

    def remove(self) -> None:
        for node in self.nodes:
            module = node.module
            if module.__dict__.pop(NODE, None) is None:
                continue
            put_back(module, Caching)
            if node.forward is not None:
                module.__dict__["forward"], node.forward = node.forward, None

    def hooked(self) -> list[str]:
        return [node.name for node in self.nodes]

    def begin(self) -> bool:
        """Point every module to its unit.

        A look-up by number inside traced code would compile every module for itself.
        """
        units = self.control.state.units[self.rule]
        for node in self.nodes:
            node.unit = units.get(node.key)
        control = self.control
        if self.per_module and control.may_be_compiled and control.actions[self.rule] == REUSE:
            self._stage_weights()
        return bool(units)

    def graph_begins(self) -> None:
        self.begin()

    def _stage_weights(self) -> None:
        """Hand each module's own weights to compiled code; the first one is of a base, which there is not."""
        state: State = self.control.state
        steps, width = state.timelines[self.rule].steps, 1 + self.predictor.depth
        stored = [n for n in self.nodes if n.unit is not None and n.unit.streams]
        if not stored:
            return
        if self.table is None:
            device = stored[0].unit.streams[0].tensors()[0].device  # type: ignore[union-attr]
            self.table = allocate((len(self.nodes), padded(width)), torch.float32, device)
            for node, row in zip(self.nodes, self.table.unbind(0), strict=True):
                node.weights = static(row[:width])
        rows = [[0.0] * self.table.shape[1] for _ in self.nodes]
        for node in stored:
            weights = self.weigh(steps, state.armed_step, node.module)
            rows[node.key][1 : 1 + len(weights)] = weights
        if rows != self.told:
            self.table.copy_(upload(torch.tensor(rows), self.table.device))
            self.told = rows

    def ready(self, state: State) -> bool:
        """Whether a step can be reused from this state; in eager each module is asked again."""
        units = state.units[self.rule].values()
        timeline = state.timelines[self.rule]
        if not timeline.pushes or not units:
            return False
        if not self.control.may_be_compiled:
            for unit in units:
                if unit.ready(timeline):
                    return True
            return False
        # all of them are asked, so that each one notices a consumer that has written into its value
        usable = [u.shared or u.ready(timeline) for u in units]
        return all(usable) and not all(u.shared for u in units)

    def call(self, node: Node, run: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a module, or predict what it would return. Traced by torch.compile."""
        control, unit = self.control, node.unit
        state: State = control.state
        traced = torch.compiler.is_compiling()
        action = control.actions[self.rule]
        if action == REUSE and unit is not None:
            if traced:
                if not unit.shared:
                    return self._reused(node, unit, state, traced)
            elif unit.ready(state.timelines[self.rule]):
                if (entry := entry_of(args, kwargs)) != unit.entry:
                    self._refuse(node, entry, unit.entry)
                return self._reused(node, unit, state, traced)
        output = run(*args, **kwargs)
        if action != COMPUTE:
            return output
        if unit is None or not (traced or self._fits(unit, output)):
            new = self._unit(output, state)
            new.shared = unit is not None and unit.shared
            unit = node.unit = state.units[self.rule][node.key] = new
        if not traced:
            unit.entry = entry_of(args, kwargs)
        stored = self._store(unit, output, state, traced)
        if traced or control.may_be_compiled or not stored or node.module._forward_hooks:
            return output
        return self._stored_aliases(unit, output)

    def _refuse(self, node: Node, entry: Any, before: Any) -> None:
        """Raise Unfit where a module gets another length than it got; half a guidance batch is none."""
        half = self.control.batch == "half" and entry is not None and before is not None
        if not (half and entry[1:] == before[1:]):
            raise Unfit(f"{node.name} gets {entry}, it got {before}")

    def _reused(self, node: Node, unit: Unit, state: State, traced: bool) -> Any:
        """What a module would return, predicted; where the predictor feeds back, it enters the history."""
        weights: Any = ()
        if traced:  # they are on the device
            weights = node.weights if self.per_module else ()
        elif not self.per_module:
            weights = self.control.weights[self.rule]
        else:
            steps = state.timelines[self.rule].steps
            weights = self.weigh(steps, state.armed_step, node.module)
        streams: Any = unit.streams
        feeds_back = self.predictor.feeds_back
        if feeds_back and not (traced or self.control.may_be_compiled or unit.touched):
            unit.touched, feeds_back = True, False
            values = [stream.advance(weights) for stream in streams]
        else:
            values = [stream.predict(None, weights) for stream in streams]
        if not traced and node.module._forward_hooks:  # one may keep what it sees
            values = [value.clone() for value in values]
        output = rebuilt(unit.template, values)
        if feeds_back:
            self._store(unit, output, state, traced)
        return output

    def _unit(self, output: Any, state: State) -> Unit:
        unit = Unit()
        unit.template = template_of(output)
        values = [self._kept(v).detach() for v in tensors(unit.template, output)]
        unit.make(values, state.timelines[self.rule], self.make_store)
        return unit

    def _fits(self, unit: Unit, output: Any) -> bool:
        """Whether a unit has storage for what its module has returned."""
        if (template_of(output) is None) != (unit.template is None):
            return False
        values = [self._kept(v) for v in tensors(unit.template, output)]
        return unit.fits(values, self.control.batch == "half")

    def _kept(self, value: Tensor) -> Tensor:
        """The conditional half of a full guidance batch, where only that will be asked for."""
        if self.conditional_half and self.control.batch == "full":
            return value[value.shape[0] // 2 :]
        return value

    def _store(self, unit: Unit, output: Any, state: State, traced: bool) -> bool:
        """Keep what a module has returned; False where that is its second call in one step."""
        if not traced and unit.touched:
            unit.shared = True
        if unit.shared:
            return False
        step = 0 if traced else state.armed_step
        for stream, value in zip(unit.streams, tensors(unit.template, output), strict=True):
            stream.store(self._kept(value).detach(), None, step)
        unit.touched = True
        return True

    @staticmethod
    def _stored_aliases(unit: Unit, output: Any) -> Any:
        """The stored tensors as the module returns them, in place of those that they were copied from."""
        pairs = zip(unit.streams, tensors(unit.template, output), strict=True)
        return rebuilt(unit.template, [stream.stored_alias(value) for stream, value in pairs])

    def unalias_outputs(self, output: Any) -> Any:
        """What the model returns, without storage in it: callers keep it for longer than a step."""
        units = self.control.state.units[self.rule].values()
        rings = {
            held.untyped_storage().data_ptr(): stream
            for unit in units
            for stream in unit.streams
            for held in stream.tensors()
        }

        def own(leaf: Any) -> Any:
            ring = rings.get(leaf.untyped_storage().data_ptr()) if type(leaf) is Tensor else None
            if ring is None:
                return leaf
            ring.hand_out_copies = True
            return leaf.clone()

        leaves, spec = tree_flatten(output)
        return tree_unflatten([own(leaf) for leaf in leaves], spec)
