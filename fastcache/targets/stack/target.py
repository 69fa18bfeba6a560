"""Skipping the stack of blocks: its residual is predicted instead of running the blocks.

The model's own loop stays as it is. Only the block lists are told, by a subclass assigned to their
`__class__`, what to hand out when the model iterates over them: on a computed step the real blocks, the
first and the last one wrapped; on a reused step one callable in place of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...models.adapter import Block
from ...policies import COMPUTE, REUSE
from ...storage.state import State
from ..base import BoundTarget
from ..decide import Part
from ..guide import Guide
from ..install import hooked_class
from .gate import BlockListHook
from .layout import BlockList, Layout
from .probe import ProbeSlots, lacks_slots
from .recording import Recorder
from .residual import allocate_unit, keep
from .routing import HOOK, RoutedModuleList


class StackTarget(BoundTarget):
    """The block lists of one model, bound to one rule of a recipe."""

    own_slots = ProbeSlots

    def __init__(
        self,
        part: Part,
        lists: list[tuple[str, nn.ModuleList]],
        start: int,
        row: Block | None,
        encoder_read: bool | None,
        make_store: Callable[[Tensor, Any], Any],
    ) -> None:
        # a predictor whose weights come from this step's own blocks
        self.guide = None if part.what.guide is None else Guide(part.what)
        super().__init__(part, self.guide)
        self.make_store, self.keeps_text = make_store, encoder_read is not False
        self.meter = self.decider.meter if self.decider.inside else None
        self.every_step = self.meter is not None and self.meter.every_step
        # calibration: also measure the magnitude ratio of every residual
        self.measure = part.when.calibrates
        self.lists = [
            BlockList(i, name, modules, row, bool(start) and i == 0)
            for i, (name, modules) in enumerate(lists)
        ]
        self.hooks = [BlockListHook(self, blocks) for blocks in self.lists]
        self.layout = Layout()  # as the last recording call has seen it
        self.recorder: Recorder | None = None  # of the running call

    # --- installing -------------------------------------------------------------------------------------

    def install(self) -> None:
        for hook in self.hooks:
            modules = hook.blocks.modules
            modules.__dict__[HOOK] = hook
            modules.__class__ = hooked_class(type(modules), RoutedModuleList)

    def remove(self) -> None:
        for blocks in self.lists:
            blocks.modules.__dict__.pop(HOOK, None)
            if isinstance(blocks.modules, RoutedModuleList):
                blocks.modules.__class__ = type(blocks.modules).__mro__[2]

    def hooked(self) -> list[str]:
        return [f"{blocks.name} ({len(blocks)} blocks)" for blocks in self.lists]

    @property
    def block_lists(self) -> list[str]:
        return [blocks.name for blocks in self.lists]

    # --- one call ---------------------------------------------------------------------------------------

    @property
    def layout_key(self) -> tuple:
        return self.layout.key

    def begin(self) -> None:
        units = self.control.state.units[self.rule]
        if self.layout.number not in units:
            units.clear()  # what is there is from before the stack was cut anew
            self._watch(Recorder(self, self.lists, self.layout))
        elif self.recorder is not None:  # an exception has ended the call that it watched
            self._watch(None)

    def _watch(self, recorder: Recorder | None) -> None:
        self.recorder = recorder
        for hook in self.hooks:
            hook.watch(recorder)

    def recorded(self, state: State) -> bool:
        """Whether storage exists, so that a graph may use it; a calibration measures eagerly."""
        if self.measure or self.layout.number not in state.units[self.rule]:
            return False
        return not (self.control.may_be_compiled and lacks_slots(self, state))

    def ready(self, state: State) -> bool:
        units, timeline = state.units[self.rule], state.timelines[self.rule]
        if self.control.batch == "full" and state.steps_until_full_batch:
            return False  # steps of the conditional half alone have left the other half behind
        if self.guide is not None and len(timeline.steps) < timeline.depth:
            return False
        if self.layout.number not in units:
            return False
        for unit in units.values():
            if not unit.ready(timeline):
                return False
        return True

    def commit(self, state: State, action: str) -> None:
        if action != COMPUTE:
            return
        left = state.steps_until_full_batch - 1
        half = self.control.batch == "half"
        state.steps_until_full_batch = state.timelines[self.rule].depth if half else max(left, 0)
        if self.meter is not None:
            self.meter.went_well(state)

    def finish(self) -> None:
        """Take over what a recording call has learnt."""
        recorder = self.recorder
        if recorder is None:
            return
        self._watch(None)
        if self.control.actions[self.rule] == REUSE:
            return
        self.layout = recorder.finish()
        for hook in self.hooks:
            hook.arrange(self.layout, self.hooks)
        state, rule = self.control.state, self.rule
        residuals = list(recorder.residuals(self.layout))
        timeline, make_store = state.timelines[rule], self.make_store
        # all of them, or none where memory runs out
        units = {n: allocate_unit(e, left, timeline, make_store) for n, e, left in residuals}
        state.units[rule].clear()
        state.units[rule].update(units)
        for number, entered, left in residuals:
            keep(state, rule, number, entered, left, self.measure)
