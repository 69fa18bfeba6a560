"""The roles that a block list plays after it was recorded: its segment is entered, left or predicted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ...policies import COMPUTE, REUSE
from ...storage.allocate import Unfit
from ..control import WHOLE
from .layout import BlockList, Entered, Layout, Left, Place, Stack
from .probe import decide_by_input, kept_output, look_at_input, look_at_output, note_decided
from .recording import Recorder
from .residual import keep, predict
from .roles import ASKING, BLOCK, PROBED, ROLES, BlockStandIn, roles_of
from .segments import continues_previous
from .way import version

NOTHING = Entered(None, None)


class BlockListHook:
    """One block list while a cache is attached: what it hands out, and the roles in place of its blocks.

    The roles are methods, called as the blocks are. torch.compile traces them: they read the control, the
    layout and the state, and nothing that counts.
    """

    def __init__(self, stack: Stack, blocks: BlockList) -> None:
        self.stack, self.blocks, self.control = stack, blocks, stack.control
        self.modules, self.probed = blocks.modules, blocks.probed
        self.asks = not blocks.index and stack.meter is not None and stack.meter.at_input
        self._take(Layout(), Place())
        self.opener = self  # the hook of the list that opens its segment
        self.recorder: Recorder | None = None  # of the running call
        self.entered = NOTHING  # by the segment that this list opens, until it is left
        self.reused: list | None = None  # handed out on reused steps, where nothing is compiled
        self.furnish()

    def furnish(self) -> None:
        """Make what stands in for the blocks that there are: beforehand, since traced code cannot."""
        blocks = self.blocks
        self.first_io, self.last_io = blocks.first_io, blocks.last_io
        self.replaced_io = blocks.replaced_io
        self.reused = None
        makes = [(role, getattr(self, role)) for role in ROLES]
        self.stand_ins = {role: [BlockStandIn(f, b) for b in blocks.known] for role, f in makes}
        known = enumerate(blocks.known)
        self.between = [BlockStandIn(partial(self._run_between, i, b), b) for i, b in known]

    def watch(self, recorder: Recorder | None) -> None:
        """Hand out what the recorder of this call stands in with; None: no call is recorded."""
        self.recorder = recorder

    def arrange(self, layout: Layout, hooks: list[BlockListHook]) -> None:
        """Go by this layout from now on. hooks: of all lists."""
        place = layout.places[self.blocks.index]
        self._take(layout, place)
        self.opener = hooks[place.opener]
        self.reused = None

    def _take(self, layout: Layout, place: Place) -> None:
        """Have at hand what the roles ask for: compiled code guards every object that it reads."""
        self.loop_does_more, self.writes_inputs = layout.loop_does_more, layout.writes_inputs
        self.segment, self.opens, self.closes = place.segment, place.opens, place.closes
        self.returns, self.positions = place.returns, place.positions

    # --- what the list hands out ------------------------------------------------------------------------

    def route(self) -> Iterator:
        """What the model's loop gets."""
        control = self.control
        action = control.actions[self.stack.rule]
        if self.recorder is not None:
            return iter(self.recorder.items(self.blocks.index))
        if action == REUSE and not control.may_be_compiled:
            return iter(self._made_for_reuse() if self.reused is None else self.reused)
        if control.phase == WHOLE and action not in (COMPUTE, REUSE):
            return self._route_undecided()
        return iter(self._items(self._roles()))

    def pick(self, index: Any) -> Any:
        """`blocks[i]` or `blocks[a:b]` inside a model's forward, routed like iteration."""
        if self.recorder is not None:
            return self.recorder.items(self.blocks.index)[index]
        return self._items(self._roles_of_all())[index]

    def _roles(self) -> list[str]:
        """The roles of this step, its action being known."""
        control = self.control
        return roles_of(
            control.actions[self.stack.rule],
            control.phase,
            self.modules,
            opens=self.opens,
            closes=self.closes,
            probed=self.probed,
            loop_does_more=self.loop_does_more,
            asks=self.asks,
        )

    def _roles_of_all(self) -> list[str]:
        """The same, where a model asks for each of its blocks, also for those that others stand in for."""
        roles = self._roles()
        return roles + ["pass_through"] * (len(self.modules) - len(roles))

    def _items(self, roles: list[str]) -> list:
        """The stand-ins that play these roles, or the blocks themselves, each in its place."""
        blocks: list = []
        if BLOCK in roles:  # traced code guards what it reads
            blocks = self.blocks.blocks() if torch.compiler.is_compiling() else self.between
        given = self.stand_ins
        try:
            return [blocks[i] if r == BLOCK else given[r][i] for i, r in enumerate(roles)]
        except IndexError:
            raise Unfit("blocks were added") from None

    def _made_for_reuse(self) -> list:
        """What the list hands out on every reused step, until a recording call sees the stack anew."""
        self.reused = self._items(self._roles())
        return self.reused

    def _route_undecided(self) -> Iterator:
        """Where the decision falls at or after the first block of the first list (eager only)."""
        if not (self.probed or self.asks):  # taking turns with the first list: not yet decided
            yield from self._undecided(0)
            return
        yield self.stand_ins[ASKING if self.asks else PROBED[WHOLE]][0]
        action = self.control.actions[self.stack.rule]
        if action == REUSE:
            yield from (self._made_for_reuse() if self.reused is None else self.reused)[1:]
        elif action == COMPUTE:
            yield from self._items(self._roles())[1:]
        else:  # all blocks are asked for before the first one runs
            yield from self._undecided(1)

    def _undecided(self, start: int) -> Iterator:
        """Stand-ins that take their role when they are called, from this place on."""
        for i, block in enumerate(self.blocks.blocks()[start:], start):
            yield BlockStandIn(partial(self._run_late, i), block)

    def _run_late(self, index: int, *args: Any, **kwargs: Any) -> Any:
        return self._items(self._roles_of_all())[index](*args, **kwargs)

    # --- roles on computed steps ------------------------------------------------------------------------

    def first(self, *args: Any, **kwargs: Any) -> Any:
        """The first block of a segment."""
        if self.asks and not torch.compiler.is_compiling():
            self.stack.start_way()  # which had to wait for the decision
        look_at_input(self.stack, self.blocks, args, kwargs)
        self._enter(*self.first_io.read(args, kwargs))
        return self._run(0, args, kwargs)

    def last(self, *args: Any, **kwargs: Any) -> Any:
        """The last block of a segment."""
        return self._leave(args, kwargs, self._run(len(self.modules) - 1, args, kwargs))

    def only(self, *args: Any, **kwargs: Any) -> Any:
        """The single block of a segment."""
        return self._leave(args, kwargs, self.first(*args, **kwargs))

    def _run(self, index: int, args: tuple, kwargs: dict) -> Any:
        if torch.compiler.is_compiling():
            return self.blocks.blocks()[index](*args, **kwargs)
        return self._run_between(index, self.blocks.known[index], *args, **kwargs)

    def _run_between(self, index: int, block: Any, *args: Any, **kwargs: Any) -> Any:
        """A block that nothing stands in for, watched (eager only)."""
        io = self.blocks.io(index)
        hidden, encoder = io.read(args, kwargs)
        self._note_arrival(index, hidden)
        output = block(*args, **kwargs)
        if (way := self.stack.way) is not None:
            relied_on = self.returns if self.opens and not index else None
            way.passed(io, output, (hidden, encoder), self.positions, relied_on)
        return output

    def _note_arrival(self, index: int, hidden: Any) -> None:
        """A block is called: note it, and whether this list still goes on where the one before has stopped."""
        way = self.stack.way
        if way is None:
            return
        before = way.left
        direct = way.arrive(self.blocks.index, index, hidden)
        joined = not (index or direct or self.opens or self.loop_does_more) and self.segment >= 0
        if joined and before is not None and not continues_previous(before, hidden):
            way.broken = True

    def _enter(self, hidden: Any, encoder: Any) -> None:
        """Note what enters the segment that this list opens."""
        stack = self.stack
        if self.writes_inputs:
            hidden = hidden.clone()
        if not stack.keeps_text and self.control.actions[stack.rule] != REUSE:
            encoder = None  # not to be kept alive: its residual is not stored
        counted = -1 if torch.compiler.is_compiling() else version(hidden)
        self.entered = Entered(hidden, encoder, counted)

    def _take_entered(self) -> Entered:
        """What entered the segment, which is left now."""
        entered, self.entered = self.entered, NOTHING
        return entered

    def _leave(self, args: tuple, kwargs: dict, output: Any) -> Any:
        """Store the residual of the segment that this list closes; returns what its last block has returned."""
        stack, state = self.stack, self.control.state
        hidden, encoder = self.last_io.read(args, kwargs)
        left = Left(*self.last_io.taken_apart(output, hidden, encoder, self.positions))
        entered = self.opener._take_entered()
        if not torch.compiler.is_compiling():
            way = stack.way
            if way is None:  # a block that autograd runs once more
                return output
            if entered.hidden is None or entered.version != version(entered.hidden):
                way.broken = True
            if way.broken:
                return output
            stack.refit(self.segment, entered, left)
        keep(state, stack.rule, self.segment, entered, left, stack.measure)
        return output

    def decide_first(self, *args: Any, **kwargs: Any) -> Any:
        """The first block of the stack, where what enters it decides whether it runs."""
        decide_by_input(self.stack, self.blocks, args, kwargs)
        if self.control.actions[self.stack.rule] != REUSE and not torch.compiler.is_compiling():
            self.stack.start_way()
        return getattr(self, self._roles_of_all()[0])(*args, **kwargs)

    # --- roles of the block that always runs --------------------------------------------------------------

    def run_first(self, *args: Any, **kwargs: Any) -> Any:
        """The first block of the stack, where the policy or the predictor wants to see its change."""
        x, text = self.first_io.read(args, kwargs)
        if self.writes_inputs:
            x = x.clone()
        output = self.blocks.first()(*args, **kwargs)
        hidden, encoder = self.first_io.streams(output, x, text, self.positions)
        look_at_output(self.stack, hidden, encoder, x, self.returns)
        if self.control.actions[self.stack.rule] != REUSE:
            self._note_first(x, output, text)
        self._go_on(hidden, encoder)
        return output

    def restore_first(self, *args: Any, **kwargs: Any) -> Any:
        """The first block of the stack, where it has run already in the head region of this step."""
        x, encoder = self.first_io.read(args, kwargs)
        hidden, encoder, now = kept_output(
            self.control.state.slots[self.stack.rule].own, x, encoder
        )
        note_decided(self.stack, hidden, x, now)
        output = self.returns.build(hidden, encoder, {})
        if self.control.actions[self.stack.rule] != REUSE:
            self._note_first(x, output, encoder)
        self._go_on(hidden, encoder)
        return output

    def _go_on(self, hidden: Any, encoder: Any) -> None:
        """Enter the segment that begins after the block that always runs."""
        if self.opens:
            if self.loop_does_more or self.control.actions[self.stack.rule] != REUSE:
                self._enter(hidden, encoder)

    def _note_first(self, x: Any, output: Any, encoder: Any) -> None:
        """The block that always runs has run, and the step is computed."""
        if torch.compiler.is_compiling():
            return
        way = self.stack.start_way()
        self._note_arrival(0, x)
        way.passed(self.first_io, output, (x, encoder), self.positions, self.returns)

    # --- roles on reused steps ----------------------------------------------------------------------------

    def predict_segment(self, *args: Any, **kwargs: Any) -> Any:
        """All blocks of a segment: its input plus the predicted residual."""
        stack, control = self.stack, self.control
        guided, rule = stack.guide is not None, stack.rule
        if guided or stack.every_step:
            look_at_input(stack, self.blocks, args, kwargs)
        hidden, encoder = self.replaced_io.read(args, kwargs)
        if control.may_be_compiled:
            weights = self._weights()
        else:
            control.predicted += 1
            weights = self._weights() if guided else control.weights[rule]
        return predict(
            control.state.units[rule][self.segment], hidden, encoder, weights, self.returns
        )

    def pass_through(self, *args: Any, **kwargs: Any) -> Any:
        """A block that the model's loop still calls on a reused step: gives back its input."""
        hidden, encoder = self.first_io.read(args, kwargs)
        return self.returns.build(hidden, encoder, {})

    def enter_segment(self, *args: Any, **kwargs: Any) -> Any:
        """The first block of a segment whose loop does more: notes its input and gives it back."""
        look_at_input(self.stack, self.blocks, args, kwargs)
        self._enter(*self.first_io.read(args, kwargs))
        return self.pass_through(*args, **kwargs)

    def leave_segment(self, *args: Any, **kwargs: Any) -> Any:
        """The last block of a segment whose loop does more: what the loop did on the way is cached too."""
        hidden, encoder, _ = self.opener._take_entered()
        if hidden is None:
            raise Unfit("its first block was left out")
        if not self.control.may_be_compiled:
            self.control.predicted += 1
        unit = self.control.state.units[self.stack.rule][self.segment]
        return predict(unit, hidden, encoder, self._weights(), self.returns)

    def _weights(self) -> Any:
        """The weights of this step, which a guide or compiled code has on the device."""
        stack, control = self.stack, self.control
        if stack.guide is not None:
            return control.state.slots[stack.rule].guide.weights
        # where nothing is compiled, nothing asks whether this is traced
        traced = control.may_be_compiled and torch.compiler.is_compiling()
        return () if traced else control.weights[stack.rule]
