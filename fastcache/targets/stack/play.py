# SPDX-License-Identifier: Apache-2.0
"""The roles that a block list plays after it was recorded: its segment is entered, left or predicted."""

from __future__ import annotations

from typing import Any

import torch

from ...policies import REUSE
from ...storage.allocate import Unfit
from ..control import REST
from .layout import BlockList, Entered, Layout, Left, Place, Stack
from .probe import look_at_input, look_at_output, note_decided, without_text
from .residual import keep, predict
from .segments import continues_previous
from .way import version

NOTHING = Entered(None, None)


class Player:
    """The roles in place of the blocks of one list, as methods that get what the blocks are called with.

    torch.compile traces them: they read the control, the layout and the state, and nothing that counts.
    """

    def __init__(self, stack: Stack, blocks: BlockList) -> None:
        self.stack, self.control = stack, stack.control
        self.opener = self  # of the list that opens the segment
        self.asks = not blocks.index and stack.meter is not None and stack.meter.at_input
        self.entered = NOTHING  # by the segment that this list opens, until it is left
        self.take_layout(Layout(), Place())
        self.take_blocks(blocks)

    def take_layout(self, layout: Layout, place: Place) -> None:
        """Have at hand what the roles ask for: compiled code guards every object that it reads."""
        self.loop_does_more, self.writes_inputs = layout.loop_does_more, layout.writes_inputs
        self.segment, self.opens, self.closes = place.segment, place.opens, place.closes
        self.returns, self.positions = place.returns, place.positions
        self.carried = place.carried

    def take_blocks(self, blocks: BlockList) -> None:
        """The same of the blocks that the list holds now."""
        self.blocks, self.modules = blocks, blocks.modules
        self.probed, self.head, self.tail = blocks.probed, blocks.head, blocks.tail
        self.first_io, self.last_io = blocks.first_io, blocks.last_io
        self.replaced_io, self.probed_io = blocks.replaced_io, blocks.probed_io
        self.skips, self.closing = blocks.skips, blocks.closing
        self.alone = (
            blocks.head == 1 and not blocks.index
        )  # what the head is given has entered the stack

    # --- roles on computed steps ------------------------------------------------------------------------

    def first(self, args: tuple, kwargs: dict) -> Any:
        """The first block of a segment."""
        if self.asks and not torch.compiler.is_compiling() and self.stack.way is None:
            self.stack.start_way()  # which had to wait for the decision
        self._look(args, kwargs)
        self._enter(*self.replaced_io.read(args, kwargs))
        return self._run(self.head, args, kwargs)

    def last(self, args: tuple, kwargs: dict) -> Any:
        """The last block of a segment."""
        return self._leave(args, kwargs, self._run(len(self.modules) - 1 - self.tail, args, kwargs))

    def only(self, args: tuple, kwargs: dict) -> Any:
        """The single block of a segment."""
        return self._leave(args, kwargs, self.first(args, kwargs))

    def _look(self, args: tuple, kwargs: dict) -> None:
        """Look at what enters a segment, where that is what enters the stack."""
        if not self.head:
            look_at_input(self.stack, self.blocks, args, kwargs)

    def _run(self, index: int, args: tuple, kwargs: dict) -> Any:
        if torch.compiler.is_compiling():
            return self.blocks.blocks()[index](*args, **kwargs)
        return self.run_as_it_is(index, args, kwargs)

    def run_as_it_is(self, index: int, args: tuple, kwargs: dict) -> Any:
        """A block that nothing stands in for, watched where the step computes (eager only)."""
        blocks, way = self.blocks, self.stack.way
        if way is None:
            if len(found := blocks.blocks()) != blocks.count:
                raise Unfit("blocks were added or taken away")
            return found[index](*args, **kwargs)
        io = blocks.io(index)
        hidden, encoder = io.read(args, kwargs)
        self._note_arrival(index, hidden)
        output = blocks.known[index](*args, **kwargs)
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
        if self.closing is not None:
            given = hidden, encoder, self.positions, self.returns
            output = self.closing.after(self.last_io, output, *given)
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

    # --- roles of the blocks that always run --------------------------------------------------------------

    def run_head(self, args: tuple, kwargs: dict) -> Any:
        """The first block of the stack, where it always runs and others after it."""
        stack = self.stack
        look_at_input(stack, self.blocks, args, kwargs)
        if stack.probed:
            x = self.first_io.read(args, kwargs)[0]
            stack.opening = x.clone() if self.writes_inputs else x
            if self.control.phase == REST:  # it has run already
                return self.pass_through(args, kwargs)
        return self._run(0, args, kwargs)

    def run_first(self, args: tuple, kwargs: dict) -> Any:
        """The last block of the head, where the policy or the predictor wants to see its change."""
        stack, control = self.stack, self.control
        given, text = self.probed_io.read(args, kwargs)
        eager = not (control.may_be_compiled and torch.compiler.is_compiling())
        if eager and stack.way is not None:
            self._note_arrival(self.head - 1, given)
        x = given if self.alone else self._opened()
        if self.writes_inputs and x is given:
            x = x.clone()
        output = self.blocks.looked_at()(*args, **kwargs)
        hidden, encoder = self.probed_io.streams(output, given, text, self.positions)
        more = None
        if control.may_be_compiled:  # what else it returns is for the second part of a step
            more = self.probed_io.further(output, given, text, self.positions)
        look_at_output(stack, hidden, encoder, more, x, self.returns)
        if control.actions[stack.rule] != REUSE:
            if eager:
                self._note_first(given, output, text)
            if self.opens:
                self._enter(hidden, encoder)
            return output
        if eager:
            stack.way = None
        if self.opens and self.loop_does_more:
            self._enter(hidden, encoder)
        return output

    def restore_first(self, args: tuple, kwargs: dict) -> Any:
        """The last block of the head, where it has run already in the head region of this step."""
        given, encoder = self.probed_io.read(args, kwargs)
        x = given if self.alone else self._opened()
        own = self.control.state.slots[self.stack.rule].own
        hidden, encoder, extra, now = own.give_back(given, encoder)
        note_decided(self.stack, without_text(hidden, x), x, now)
        output = self.returns.build(hidden, encoder, extra)
        computes = self.control.actions[self.stack.rule] != REUSE
        if computes and not torch.compiler.is_compiling():
            self._note_first(given, output, encoder)
        if self.opens and (computes or self.loop_does_more):
            self._enter(hidden, encoder)
        return output

    def _opened(self) -> Any:
        """What entered the stack, where that is not what the last block of the head is given."""
        stack = self.stack
        x, stack.opening = stack.opening, None
        return x

    def _note_first(self, given: Any, output: Any, encoder: Any) -> None:
        """The last block of the head has run, and the step computes (eager only)."""
        stack, alone = self.stack, self.head == 1
        way = stack.way
        if way is None:  # it had to wait for the decision
            way = stack.start_way()
            self._note_arrival(self.head - 1, given)
        relied_on = self.returns if alone else None
        way.passed(self.probed_io, output, (given, encoder), self.positions, relied_on)

    # --- roles on reused steps ----------------------------------------------------------------------------

    def predict_segment(self, args: tuple, kwargs: dict) -> Any:
        """All blocks of a segment: its input plus the predicted residual."""
        stack, control = self.stack, self.control
        guided, rule = stack.guide is not None, stack.rule
        if guided or stack.every_step:
            self._look(args, kwargs)
        hidden, encoder = self.replaced_io.read(args, kwargs)
        if control.may_be_compiled:
            weights = self._weights()
        else:
            control.predicted += 1
            weights = self._weights() if guided else control.weights[rule]
        unit = control.state.units[rule][self.segment]
        return predict(unit, hidden, encoder, weights, self.returns)

    def pass_through(self, args: tuple, kwargs: dict) -> Any:
        """A block that the model's loop still calls on a reused step: gives back its input."""
        hidden, encoder = self.first_io.read(args, kwargs)
        extra = {}
        for at, key in self.carried:
            extra[at] = kwargs.get(key) if isinstance(key, str) else args[key]
        return self.returns.build(hidden, encoder, extra)

    def enter_segment(self, args: tuple, kwargs: dict) -> Any:
        """The first block of a segment whose loop does more: notes its input and gives it back."""
        self._look(args, kwargs)
        self._enter(*self.replaced_io.read(args, kwargs))
        return self.pass_through(args, kwargs)

    def leave_segment(self, args: tuple, kwargs: dict) -> Any:
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
