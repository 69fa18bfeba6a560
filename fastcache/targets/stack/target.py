# SPDX-License-Identifier: Apache-2.0
"""Skipping the stack of blocks: its residual is predicted instead of running the blocks.

The model's own loop stays as it is. Only the block lists are told, by a subclass assigned to their
`__class__`, what to hand out when the model iterates over them: on a computed step the real blocks, the
first and the last one wrapped; on a reused step one callable in place of all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ...models.adapter import Block
from ...policies import COMPUTE, REUSE
from ...storage.state import State
from ...storage.together import Group, Member
from ..base import BoundTarget
from ..control import PENDING, REST, Stop
from ..decide import Part
from ..guide import Guide
from ..outputs import BARE
from .closing import Closing
from .each import group_of, looking, returns_more
from .gate import BlockListHook
from .layout import BlockList, Entered, Layout, Left, spread
from .play import NOTHING
from .probe import ProbeSlots, lacks_slots
from .recording import Recorder
from .residual import allocate_unit, fits, keep
from .way import Way


class StackTarget(BoundTarget):
    """The block lists of one model, bound to one rule of a recipe."""

    counted = True
    own_slots = ProbeSlots

    def __init__(
        self,
        part: Part,
        lists: list[tuple[str, nn.ModuleList]],
        always: tuple[int, int],
        row: Block | None,
        encoder_read: bool | None,
        make_store: Callable[[Tensor, Any], Any],
        norm: tuple[str, nn.Module] | None = None,
    ) -> None:
        """always: how many of the first and of the last blocks always run, of all lists as one. norm: see `Closing`."""
        # whose weights come from this step's own blocks
        self.guide = None if part.what.guide is None else Guide(part.what)
        super().__init__(part, self.guide)
        # a policy or a predictor looks at what the first blocks make of what enters them
        self.probed = part.when.runs_first_block or part.what.guide == "residual"
        self.ordered, self.tailed = any(always), bool(always[1])
        self.always = (always[0] or int(self.probed), always[1])
        self.early = self.probed and self.always[0] > 1  # blocks run before the decision
        self.make_store, self.keeps_text = make_store, encoder_read is not False or self.tailed
        self.meter = self.decider.meter if self.decider.inside else None
        # compiled, a step computes its first block, waits for the decision, and goes on from what it has kept
        self.in_parts = self.meter is not None and not self.meter.at_input
        self.every_step = self.meter is not None and self.meter.every_step
        self.measure = part.when.calibrates  # the magnitude ratio of every residual too
        self.row = row
        self.closing = None if norm is None else Closing(self, *norm)
        self.lists = self._furnished(lists)
        self.opening: Any = None  # what entered the first block, until the head is looked at
        self.hooks = [BlockListHook(self, blocks) for blocks in self.lists]
        self.go_by(Layout())
        self.recorder: Recorder | None = None  # of the running call
        self.way: Way | None = None  # how it goes through the stack, where it computes

    def _furnished(self, lists: Sequence[tuple[str, nn.ModuleList]]) -> list[BlockList]:
        """What is known of these lists, beforehand."""
        places = spread([len(modules) for _, modules in lists], *self.always)
        looked_at = max((i for i, (head, _) in enumerate(places) if head), default=0)
        found = [
            BlockList(i, name, modules, self.row, places[i], self.probed and i == looked_at)
            for i, (name, modules) in enumerate(lists)
        ]
        found[-1].closing = self.closing
        return found

    # --- installing -------------------------------------------------------------------------------------

    def install(self) -> None:
        for stands_in in (*self.hooks, self.closing):
            if stands_in is not None:
                stands_in.install()

    def remove(self) -> None:
        for stands_in in (*self.hooks, self.closing):
            if stands_in is not None:
                stands_in.remove()

    def hooked(self) -> list[str]:
        return [f"{blocks.name} ({len(blocks)} blocks)" for blocks in self.lists]

    @property
    def block_lists(self) -> list[str]:
        return [blocks.name for blocks in self.lists]

    # --- one call ---------------------------------------------------------------------------------------

    def go_by(self, layout: Layout) -> None:
        """Have at hand what every step asks of a layout, as the last recording call has seen it."""
        self.layout, self.number = layout, layout.number
        self.segments = len(layout.segments) or -1
        self.unusual = self.early or layout.loop_does_more  # blocks are entered on reused steps too

    @property
    def layout_key(self) -> tuple:
        return self.layout.key

    def begin(self) -> bool:
        control, rule = self.control, self.rule
        state: State = control.state
        held, self.way = self.number in state.units[rule], None
        computes = control.actions[rule] == COMPUTE
        if computes or not held or self.unusual or self.recorder is not None:
            self._begin(held, state)
            if self.measure or not held:
                return False
        return not (control.may_be_compiled and self.in_parts and lacks_slots(self, state))

    def _begin(self, held: bool, state: State) -> None:
        """A step that computes, or of a stack in which blocks are entered whatever is decided."""
        rule = self.rule
        action = self.control.actions[rule]
        if action == COMPUTE or not held or (self.early and action == PENDING):
            self.start_way()
        elif self.layout.loop_does_more:
            self._enter_none()
        if not held:
            state.units[rule].clear()  # what is there is from before the stack was cut anew,
            state.timelines[rule].clear()  # and so are the steps
            assert self.way is not None
            self._watch(Recorder(self, self.lists, self.layout, self.way))
        elif self.recorder is not None:  # an exception has ended the call that it watched
            self._watch(None)

    def start_way(self) -> Way:
        """The step computes: see how it goes through the stack, and whether that holds the blocks that it held."""
        self.way = way = Way()
        self._enter_none()
        if any(blocks.changed() for blocks in self.lists):
            self._refurnish()
        return way

    def _enter_none(self) -> None:
        """Forget what was entered by a call that never left."""
        self.opening = None
        for hook in self.hooks:
            hook.entered = NOTHING
        if self.closing is not None:
            self.closing.done = False

    def _refurnish(self) -> None:
        """The lists hold other blocks than they did: forget how they run."""
        empty = [blocks.name for blocks in self.lists if not len(blocks.modules)]
        if empty:
            raise ValueError(
                f"target: {empty} hold no blocks any more; call cache.disable() before they are taken away"
            )
        self.lists = self._furnished([(old.name, old.modules) for old in self.lists])
        if not any(blocks.skips for blocks in self.lists):
            raise ValueError(
                f"target: {[blocks.name for blocks in self.lists]} hold no blocks any more that are skipped; call "
                "cache.disable() before they are taken away"
            )
        self.go_by(Layout(used=self.layout.next_number))
        for hook, blocks in zip(self.hooks, self.lists, strict=True):
            hook.furnish(blocks)

    def _watch(self, recorder: Recorder | None) -> None:
        self.recorder = recorder
        for hook in self.hooks:
            hook.watch(recorder)

    def recorded(self, state: State) -> bool:
        """Whether storage exists, so that a graph may use it; a calibration measures eagerly."""
        if self.measure or self.number not in state.units[self.rule]:
            return False
        return not (self.control.may_be_compiled and self.in_parts and lacks_slots(self, state))

    def ready(self, state: State) -> bool:
        units, timeline = state.units[self.rule], state.timelines[self.rule]
        if state.steps_until_full_batch and self.control.batch == "full":
            return False  # steps of the conditional half alone have left the other half behind
        short = self.guide is not None and len(timeline.steps) < self.guide.predictor.needs
        if short or self.number not in units:
            return False
        for unit in units.values():
            if not unit.ready(timeline):
                return False
        return True

    @property
    def splits(self) -> bool:
        """Whether a batch can be told apart by sample: a calibration measures, and a series feeds, all of it."""
        return not (self.measure or self.decider.what.feeds_back)

    def prepare_like(self, state: State, other: State) -> None:
        rule = self.rule
        units, own = other.units[rule], state.slots[rule].own
        if not self.splits or returns_more(units) or state.units[rule]:
            return
        made = ((at, u.like(state.timelines[rule], self.make_store)) for at, u in units.items())
        state.units[rule].update(made)
        if self.guide is not None:
            self.guide.prepare_like(state, other, rule)
        if own.hidden is None:
            own.take_form(other.slots[rule].own)

    def together(self, samples: Sequence[Member], head: Group | None = None) -> Group | None:
        """The residuals of several requests, split by sample along their first dimension.

        Blocks that fold frames into the batch go alone, which shows by the sizes of what is held; so do those whose
        first ones return what a step that goes on after them would have to keep.
        """
        rule, states = self.rule, [sample.state for sample in samples]
        folds = any(not isinstance(u.template.base, bool) for u in states[0].units[rule].values())
        if folds or not self.splits or any(returns_more(state.units[rule]) for state in states):
            return None
        seen = next((b.index for b in self.lists if b.probed), 0)
        returns = self.layout.places[seen].returns if self.layout.places else BARE
        if returns.further and self.in_parts and samples[0].actions[rule] == PENDING:
            return None
        return group_of(self, samples, head, returns.encoder is not None)

    @contextlib.contextmanager
    def serving(self, group: Group) -> Iterator[bool]:
        control = self.control
        before = self.decider, self.meter, self.guide
        looks: Any = looking(*before, group)
        control.state = group
        recorded = control.begin_step([self])
        if control.phase == REST:
            self.way = group.way if control.actions[self.rule] == COMPUTE else None
        self.decider, self.meter, self.guide = looks
        try:
            yield recorded
        except Stop:
            group.way = self.way
            raise
        finally:
            self.decider, self.meter, self.guide = before

    def unanswered(self) -> bool:
        """Whether a step that was to be reused has predicted too little.

        The model has then not called what stood in for its blocks, so its output is without them. A step whose
        first block was to decide, and which never ran, has computed what it did run.
        """
        control = self.control
        action = control.actions[self.rule]
        if action == REUSE:  # nothing counts in compiled code, where what chooses blocks is guarded
            return not control.may_be_compiled and control.predicted < self.segments
        if action == PENDING:
            self.decider.compute_instead("its first block did not run")
        return False

    def refit(self, number: int, entered: Entered, left: Left) -> None:
        """Have storage for the residual of a segment as it is in this call."""
        state = self.control.state
        units, unit = state.units[self.rule], state.units[self.rule][number]
        if not fits(unit, entered, left, self.control.batch == "half"):
            new = allocate_unit(entered, left, state.timelines[self.rule], self.make_store)
            new.way, units[number] = unit.way, new

    def commit(self, state: State, action: str) -> None:
        super().commit(state, action)
        if action != COMPUTE:
            return
        self._check(state)
        if self.meter is not None:
            self.meter.went_well(state)

    def _check(self, state: State) -> None:
        """Hold what a computed call was seen to do against what was learnt; learn anew where it is another way.

        In compiled calls nothing was seen: what may differ there is guarded, or part of the signature.
        """
        way, self.way = self.way, None
        if way is None or not (way.calls or way.broken):
            return
        units = state.units[self.rule]
        known = next((unit.way for unit in units.values()), None)
        if way.broken or tuple(way.calls) != known:
            units.clear()

    def finish(self) -> None:
        """Take over what a recording call has learnt."""
        recorder = self.recorder
        if recorder is None:
            return
        self._watch(None)
        self.way = None  # nothing to hold it against
        if self.control.actions[self.rule] == REUSE:
            return
        self.go_by(recorder.finish())
        if self.closing is not None:
            self.closing.check(self.layout.order[-1:] in ((), (len(self.lists) - 1,)))
        for hook in self.hooks if self.layout.places else ():
            hook.arrange(self.layout, self.hooks)
        state, rule = self.control.state, self.rule
        residuals = list(recorder.residuals(self.layout))
        timeline, make_store = state.timelines[rule], self.make_store
        # all of them, or none where memory runs out
        units = {n: allocate_unit(e, left, timeline, make_store) for n, e, left in residuals}
        state.units[rule].clear()
        state.units[rule].update(units)
        for unit in units.values():
            unit.way = tuple(recorder.way.calls)
        for number, entered, left in residuals:
            keep(state, rule, number, entered, left, self.measure)
